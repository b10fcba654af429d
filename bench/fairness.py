"""Is device time shared by weight, and are waits bounded? Simulates days of a service on its own SQL.

    python -m bench.fairness [--hours 48] > bench/fairness.md

The statements are those of the service: claims, charges, lent slots, turns of pools, and levelled newcomers, in the
roles of worker and schedule. Time (simulated_service) and training (simulated_workers) are simulated.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from bench.simulated_service import FOREVER, LOGIN, POOLS, Arrival, Service, make_database
from bench.simulated_workers import TICK_SECONDS, SimulatedWorker
from core.db.migrate import login_url
from core.db.session import connect
from local.servers import LocalServers

WINDOW_SECONDS = 4 * 3600.0


@dataclass
class Outcome:
    """What a run showed: waits by tenant, the worst deviation from weights in any window, loads."""

    service: Service
    worst_share: dict[str, tuple[float, float]]
    hours: float
    num_workers: int


def simulate(
    owner_url: str,
    name: str,
    *,
    weights: dict[str, float],
    arrivals: Iterable[Arrival],
    steady: tuple[str, ...],
    num_workers: int,
    hours: float,
) -> Outcome:
    """Run one scenario on a database of its own. `steady` tenants have work from their first arrival to the end."""
    engine = make_database(owner_url, name)
    worker_engine = connect(login_url(owner_url.rpartition("/")[0] + f"/{name}", LOGIN))
    service = Service(engine)
    for slug, weight in weights.items():
        service.add_tenant(slug, weight)
    workers = [SimulatedWorker(service, worker_engine, f"worker-{number}") for number in range(num_workers)]
    coming = sorted(arrivals, key=lambda arrival: arrival.at)
    began = {slug: min(a.at for a in coming if a.tenant == slug) for slug in steady}
    seen: list[tuple[float, dict[str, float]]] = []
    while service.now < hours * 3600:
        while coming and coming[0].at <= service.now:
            service.submit(coming.pop(0))
        for worker in workers:
            worker.tick()
        seen.append((service.now, dict(service.used)))
        service.advance(TICK_SECONDS)
    engine.dispose()
    worker_engine.dispose()
    return Outcome(service, worst_shares(seen, weights, began), hours, num_workers)


def worst_shares(
    seen: list[tuple[float, dict[str, float]]], weights: dict[str, float], began: dict[str, float]
) -> dict[str, tuple[float, float]]:
    """Return the least and greatest part that each steady tenant had in any window of what its weight gives it."""
    worst = dict.fromkeys(began, (9.0, 0.0))
    length = int(WINDOW_SECONDS / TICK_SECONDS)
    for first, last in zip(seen[:-length:12], seen[length::12], strict=False):
        present = [slug for slug, at in began.items() if at <= first[0]]
        used = {slug: last[1].get(slug, 0.0) - first[1].get(slug, 0.0) for slug in present}
        if len(present) < 2 or not sum(used.values()):  # alone it has what it wants
            continue
        for slug in present:
            entitled = weights[slug] / sum(weights[other] for other in present)
            part = used[slug] / sum(used.values()) / entitled
            worst[slug] = (min(worst[slug][0], part), max(worst[slug][1], part))
    return worst


def poisson(draw: random.Random, *, every: float, hours: float, since: float = 0.0) -> Iterator[float]:
    at = since
    while (at := at + draw.expovariate(1 / every)) < hours * 3600:
        yield at


def whale_and_others(owner_url: str, hours: float) -> Outcome:
    """One worker, two pools: a whale whose jobs never end, beside it 2 min an hour, elsewhere 10 min each 30."""
    draw = random.Random(1)
    plain, nf4 = POOLS
    arrivals = [Arrival(0.0, "whale", plain, FOREVER, 48)]
    arrivals += [Arrival(at, "small", plain, 120.0) for at in poisson(draw, every=3600, hours=hours)]
    arrivals += [Arrival(at, "other-pool", nf4, 600.0) for at in poisson(draw, every=1800, hours=hours)]
    weights = {"whale": 1.0, "small": 1.0, "other-pool": 1.0}
    return simulate(owner_url, "whale", weights=weights, arrivals=arrivals, steady=(), num_workers=1, hours=hours)


def weights_in_one_pool(owner_url: str, hours: float) -> Outcome:
    """One worker, one pool: endless work of weights 1, 1 and 2; the second tenant comes after 12 hours."""
    (plain, _) = POOLS
    arrivals = [
        Arrival(0.0, "weight-1", plain, FOREVER, 48),
        Arrival(0.0, "weight-2", plain, FOREVER, 48),
        Arrival(12 * 3600.0, "newcomer", plain, FOREVER, 48),
    ]
    weights = {"weight-1": 1.0, "weight-2": 2.0, "newcomer": 1.0}
    return simulate(
        owner_url, "one_pool", weights=weights, arrivals=arrivals, steady=tuple(weights), num_workers=1, hours=hours
    )


def weights_in_two_pools(owner_url: str, hours: float) -> Outcome:
    """One worker, two pools: endless work of weight 1 in the one and of weight 2 in the other."""
    plain, nf4 = POOLS
    arrivals = [Arrival(0.0, "weight-1", plain, FOREVER, 48), Arrival(0.0, "weight-2", nf4, FOREVER, 48)]
    weights = {"weight-1": 1.0, "weight-2": 2.0}
    return simulate(
        owner_url, "two_pools", weights=weights, arrivals=arrivals, steady=tuple(weights), num_workers=1, hours=hours
    )


def sprinters_on_eight_workers(owner_url: str, hours: float) -> Outcome:
    """Eight workers, two pools: two whales of weight 1 and 2, three tenants that submit ten jobs of 3 min every 2 h."""
    draw = random.Random(2)
    plain, nf4 = POOLS
    arrivals = [Arrival(0.0, "whale", plain, FOREVER, 200), Arrival(0.0, "whale-2", nf4, FOREVER, 200)]
    for number in range(3):
        pool = POOLS[number % 2]
        arrivals += [
            Arrival(at, f"sprinter-{number}", pool, 180.0, 10) for at in poisson(draw, every=7200, hours=hours)
        ]
    weights = {"whale": 1.0, "whale-2": 2.0} | {f"sprinter-{number}": 1.0 for number in range(3)}
    return simulate(
        owner_url,
        "eight",
        weights=weights,
        arrivals=arrivals,
        steady=("whale", "whale-2"),
        num_workers=8,
        hours=hours,
    )


SCENARIOS: tuple[Callable[[str, float], Outcome], ...] = (
    whale_and_others,
    weights_in_one_pool,
    weights_in_two_pools,
    sprinters_on_eight_workers,
)


def report(scenario: Callable[[str, float], Outcome], outcome: Outcome) -> None:
    service = outcome.service
    loading = service.load_seconds / (outcome.hours * 3600 * outcome.num_workers)
    print(f"\n## {(scenario.__doc__ or '').strip()}\n")
    print(f"{service.num_loads} loads ({loading:.1%} of the time), {service.num_lent} slots given to others.\n")
    print("| tenant | device hours | submissions | first start, median | worst | least and greatest share in 4 h |")
    print("|---|---|---|---|---|---|")
    for slug in service.tenants:
        waits = service.waits[slug]
        cells = [slug, f"{service.used[slug] / 3600:.1f}", str(len(waits))]
        cells += [f"{statistics.median(waits):.0f} s", f"{max(waits):.0f} s"] if waits else ["-", "-"]
        least, greatest = outcome.worst_share.get(slug, (0.0, 0.0))
        cells.append(f"{least:.2f} to {greatest:.2f} of its weight" if greatest else "-")
        print("| " + " | ".join(cells) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hours", type=float, default=48.0)
    parser.add_argument("--only", type=int, help="one scenario, by its number from 0")
    given = parser.parse_args()
    print(f"# Fair in time\n\n`python -m bench.fairness --hours {given.hours:g}`")
    scenarios = SCENARIOS if given.only is None else SCENARIOS[given.only : given.only + 1]
    with tempfile.TemporaryDirectory() as directory, LocalServers(Path(directory), is_durable=False) as servers:
        for scenario in scenarios:
            report(scenario, scenario(servers.addresses.postgres_url, given.hours))


if __name__ == "__main__":
    main()
