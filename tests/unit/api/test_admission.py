"""The gates of long work, and which routes use them."""

from __future__ import annotations

import uuid
from collections.abc import Generator

import anyio
import pytest

from api import admission
from api.admission import Gate
from core.domain.errors import RateLimitedError, UnavailableError
from tests.routes import all_routes

GATES = [each for each in vars(admission).values() if isinstance(each, Gate)]
BEHIND = {
    "GET /v1/adapters/{adapter_id}/download": None,  # an archive only: see hold_place_for_archive
    "GET /v1/files": admission.LISTINGS,
    "GET /v1/files/{file_id}/content": admission.DOWNLOADS,
    "GET /v1/fine_tuning/jobs/{job_id}/logs": admission.LISTINGS,
    "GET /v1/fine_tuning/jobs/{job_id}/metrics": admission.LISTINGS,
    "GET /v1/models": admission.LISTINGS,
    "POST /v1/files": admission.MULTIPART_BODIES,
    "POST /v1/files/{file_id}/preview": admission.PREVIEWS,
    "POST /v1/uploads/{upload_id}/complete": admission.COMPLETIONS,
    "POST /v1/uploads/{upload_id}/parts": admission.MULTIPART_BODIES,
}


def take(gate: Gate, tenant_id: uuid.UUID, count: int, stack: list[object]) -> None:
    for _ in range(count):
        place = gate.admit(tenant_id)
        place.__enter__()
        stack.append(place)


def test_a_tenant_has_its_share_and_the_rest_is_for_others() -> None:
    gate = Gate("naps", places=3, of_tenant=2)
    held: list[object] = []
    first, second, third = (uuid.uuid4() for _ in range(3))
    take(gate, first, 2, held)
    with pytest.raises(RateLimitedError) as refused, gate.admit(first):
        pass
    assert refused.value.code == "too_many_naps"
    take(gate, second, 1, held)
    with pytest.raises(UnavailableError) as busy, gate.admit(third):
        pass
    assert busy.value.code == "naps_busy"
    held.pop().__exit__(None, None, None)  # type: ignore[attr-defined]
    with gate.admit(third):
        pass


@pytest.mark.parametrize("gate", GATES, ids=lambda gate: gate.name)
def test_no_tenant_can_have_all_the_places_of_a_gate(gate: Gate) -> None:
    assert gate.of_tenant * 2 <= gate.places == gate.threads.total_tokens


@pytest.mark.parametrize("route", [pytest.param(route, id=route.path) for route in all_routes()])
def test_every_route_that_asks_the_store_or_a_child_stands_behind_its_gate(route: object) -> None:
    name = f"{'|'.join(sorted(route.methods))} {route.path}"  # type: ignore[attr-defined]
    gates = [each.dependency for each in route.dependencies if isinstance(each.dependency, Gate)]  # type: ignore[attr-defined]
    asks_store = any(each.name in {"store", "previews"} for each in route.dependant.dependencies)  # type: ignore[attr-defined]
    assert gates == [gate for gate in [BEHIND.get(name)] if gate]
    signs_only = name == "GET /v1/fine_tuning/checkpoints/{checkpoint:path}/download"
    assert not asks_store or name in BEHIND or signs_only


def test_what_is_iterated_is_closed_when_its_reader_goes() -> None:
    closed = []

    def chunks() -> Generator[bytes]:
        try:
            yield b"first"
            yield b"second"
        finally:
            closed.append(True)

    async def read_one() -> bytes:
        stream = Gate("naps", places=1, of_tenant=1).iterate(chunks())
        first = await anext(aiter(stream))
        await stream.aclose()  # type: ignore[attr-defined]
        return first

    assert anyio.run(read_one) == b"first"
    assert closed == [True]
