"""Jobs that are evicted during a step, at every place where the engine lets its caller look."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import count

import pytest
import torch

from tests.unit.engine.starved import Standing, assert_every_row_has_one_slot, assert_unmoved, standings
from tests.unit.engine.tiny import (
    make_engine,
    make_job,
    random_examples,
    randomise_weights,
    tiny_llama,
    train,
)
from worker.engine import Engine, SlotReport
from worker.engine.bases import recompute_layers
from worker.engine.frozen import FrozenWeight
from worker.engine.heads import _CHUNK_BYTES
from worker.engine.states import SlotState

NUM_LAYERS = 2


@dataclass
class Place:
    """A look that does something once: the one with this number. `num_after` counts the looks since."""

    number: int
    act: Callable[[], object]
    num_looks: int = 0

    def __call__(self) -> None:
        self.num_looks += 1
        if self.num_looks == self.number:
            self.act()

    @property
    def num_after(self) -> int:
        return self.num_looks - self.number


def make_engine_of(*names: str, num_recomputed: int = 0, batch_size: int = 5, max_tokens: int = 256) -> Engine:
    model = tiny_llama()
    engine = make_engine(model, max_tokens=max_tokens)
    recompute_layers(model, num_recomputed)
    for seed, name in enumerate(names):
        engine.admit(make_job(name, seed=seed + 1, batch_size=batch_size))
        randomise_weights(engine, name, seed=seed)
    train(engine, num_fused_steps=2)
    return engine


def places(*names: str, evicted: str, **settings: int) -> Iterator[tuple[Engine, Place, tuple[SlotReport, ...]]]:
    """Step engines in which a job is evicted at the first look, at the second, and so on to the last."""
    for number in count(1):
        engine = make_engine_of(*names, **settings)
        place = Place(number, partial(engine.evict, evicted))
        reports = engine.step(look=place)
        if place.num_looks < number:
            return
        yield engine, place, reports


def recorded(product: Callable[..., torch.Tensor], happened: list[str]) -> Callable[..., torch.Tensor]:
    def multiply(*arguments: object) -> torch.Tensor:
        happened.append("product")
        return product(*arguments)

    return multiply


def test_no_two_products_of_a_step_are_without_a_look_between_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(_CHUNK_BYTES, "cpu", 1)  # so that the loss takes several chunks
    happened: list[str] = []
    engine = make_engine_of("a", "b", batch_size=10)
    for kind in FrozenWeight.__subclasses__():
        for name in ("multiply", "multiply_back"):
            monkeypatch.setattr(kind, name, recorded(getattr(kind, name), happened))
    engine.begin_evaluation("a", random_examples(8, 20))
    engine.step(look=lambda: happened.append("look"))
    stretches = "".join(each[0] for each in happened).split("l")
    widest = 3  # query, key and value read the same rows and are one product; so are a chunk's logits and gradient
    assert stretches[0] == ""
    assert max(map(len, stretches)) == widest
    assert len(stretches) > 3 * 4 * NUM_LAYERS


@pytest.mark.parametrize("num_recomputed", [0, NUM_LAYERS])
def test_a_step_is_left_at_the_next_look_once_all_who_are_in_it_are_evicted(num_recomputed: int) -> None:
    fresh = make_engine()
    fresh.admit(make_job("next"))
    expected, num_places = train(fresh, num_fused_steps=2), 0
    for engine, place, reports in places("mine", evicted="mine", num_recomputed=num_recomputed):
        num_places += 1
        assert (reports, place.num_after, engine.slot_names) == ((), 0, ())
        assert (engine.running_names, engine._context.waiting) == ([], {})
        engine.admit(make_job("next"))
        assert train(engine, num_fused_steps=2) == expected
    assert num_places > 2 * 4 * NUM_LAYERS


def test_whoever_is_evicted_from_a_step_leaves_the_others_theirs_bit_for_bit() -> None:
    untroubled = make_engine_of("first", "mine", "last")
    expected = {report.slot_name: report for report in untroubled.step()}
    num_places = 0
    for engine, _place, reports in places("first", "mine", "last", evicted="mine"):
        num_places += 1
        assert engine.slot_names == ("first", "last")
        assert_every_row_has_one_slot(engine)
        found = {report.slot_name: report for report in reports}
        assert found["mine"].update is None
        for name in engine.slot_names:
            assert found[name] == expected[name]
            assert Standing.of(untroubled._slots[name]).has_numbers_of(engine._slots[name])
    assert num_places > 2 * 4 * NUM_LAYERS


def test_a_job_that_is_not_in_the_step_under_way_leaves_at_once_and_the_step_goes_on() -> None:
    for number in (1, 9, 17):
        engine = make_engine_of("first", "mine", "last")
        untroubled = make_engine_of("first", "mine", "last")
        for each in (engine, untroubled):  # whoever has nothing left to train is in no step
            each._slots["first"].cursor.step = each._slots["first"].cursor.total_steps
        seen: list[str] = []

        def leave(engine: Engine = engine, seen: list[str] = seen) -> None:
            engine.evict("first")
            seen.extend(engine.running_names)

        place = Place(number, leave)
        assert engine.step(look=place) == untroubled.step()
        assert seen == ["mine", "last"]
        assert_every_row_has_one_slot(engine)
        assert_unmoved(engine, standings(untroubled, but=("first",)))


@pytest.mark.parametrize("num_recomputed", [0, NUM_LAYERS])
def test_a_step_that_keeps_an_evicted_job_for_too_long_is_made_again_for_the_others(
    monkeypatch: pytest.MonkeyPatch, num_recomputed: int
) -> None:
    monkeypatch.setattr("worker.engine.steps.PATIENCE_SECONDS", -1.0)
    alone = make_engine()
    alone.admit(make_job("last", seed=2, batch_size=9))
    randomise_weights(alone, "last", seed=1)
    expected = {update.step: update.loss for update in train(alone)["last"]}
    settings = {"num_recomputed": num_recomputed, "batch_size": 9, "max_tokens": 70}
    assert make_engine_of("mine", "last", **settings)._slots["last"].cursor.position > 0, "it is in no batch's middle"
    num_places = 0
    for engine, place, reports in places("mine", "last", evicted="mine", **settings):
        num_places += 1
        assert (reports, place.num_after, engine.slot_names) == ((), 0, ("last",))
        assert_every_row_has_one_slot(engine)
        if num_places % 8 == 1:
            updates = train(engine)["last"]
            assert updates[-1].is_last
            assert [u.loss for u in updates] == pytest.approx([expected[u.step] for u in updates], abs=1e-4)
    assert num_places > 2 * 4 * NUM_LAYERS


def test_leaving_again_and_again_costs_the_others_a_few_steps_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.engine.steps.PATIENCE_SECONDS", -1.0)
    engine, num_lost = make_engine(), 0
    engine.admit(make_job("mine", batch_size=8, n_epochs=50))
    for number in range(40):
        name = f"fickle {number}"
        beside: list[str] = []

        def leave(name: str = name, beside: list[str] = beside) -> None:
            beside.extend(engine.running_names)
            engine.evict(name)

        engine.admit(make_job(name, seed=2, batch_size=8))
        reports = engine.step(look=Place(12, leave))
        num_lost += "mine" in beside and not reports
    assert 0 < num_lost <= 8  # halvings of 256 tokens
    assert engine.slot_names == ("mine",)
    assert engine._budget.cap < 256


def test_steps_that_were_shortened_grow_again_once_many_were_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.engine.token_budgets._BRISK_STEPS", 5)
    engine, alone = make_engine(max_tokens=100), make_engine(max_tokens=100)
    for each in (engine, alone):
        each.admit(make_job("mine", batch_size=8, n_epochs=50))
    engine.admit(make_job("fickle", seed=2, batch_size=8))
    monkeypatch.setattr("worker.engine.steps.PATIENCE_SECONDS", -1.0)
    assert engine.step(look=Place(12, partial(engine.evict, "fickle"))) == ()
    shortened = engine._budget.cap
    assert shortened < 100
    for _ in range(20):
        engine.step()
    assert engine._budget.cap == shortened, "no step was quick enough"
    monkeypatch.setattr("worker.engine.steps.PATIENCE_SECONDS", math.inf)
    lengths = [shortened]
    while engine.slot_names and len(lengths) < 40:
        assert engine.step()
        lengths.append(engine._budget.cap)
    assert set(lengths[:5]) == {shortened}
    assert (max(lengths), engine._budget.tokens) == (100, 100)
    updates, expected = train(engine)["mine"], {each.step: each.loss for each in train(alone)["mine"]}
    assert [each.loss for each in updates] == pytest.approx([expected[each.step] for each in updates], abs=1e-4)


def test_an_evaluation_is_left_at_the_next_look_and_the_others_train_on_bit_for_bit() -> None:
    examples = random_examples(8, 5)
    for number in count(1):
        engine, untroubled = make_engine_of("mine", "last"), make_engine_of("mine", "last")
        untroubled.evict("mine")
        engine.begin_evaluation("mine", examples)
        running: list[str] = []

        def leave(engine: Engine = engine, running: list[str] = running) -> None:
            running.extend(engine.running_names)
            engine.evict("mine")

        reports = engine.step(look=Place(number, leave))
        if running == ["last"]:
            break
        assert running == ["mine"]
        assert reports == untroubled.step()
        assert_unmoved(engine, standings(untroubled))
    assert number > 4 * NUM_LAYERS


def test_a_state_captured_within_a_step_is_the_one_before_it() -> None:
    for number in (1, 9, 17):
        engine = make_engine_of("mine", "last")
        before = engine.capture_state("mine")
        within: list[SlotState] = []
        place = Place(
            number, partial(lambda engine, within: within.append(engine.capture_state("mine")), engine, within)
        )
        engine.step(look=place)
        assert within[0].cursor == before.cursor
        assert all(torch.equal(within[0].tensors[name], tensor) for name, tensor in before.tensors.items())


def test_looking_changes_nothing() -> None:
    looking, plain = make_engine_of("a", "b"), make_engine_of("a", "b")
    for _ in range(3):
        assert looking.step(look=lambda: None) == plain.step()
    assert_unmoved(looking, standings(plain))


def test_nothing_is_admitted_within_a_step() -> None:
    engine = make_engine_of("mine")
    with pytest.raises(AssertionError, match="within a step"):
        engine.step(look=lambda: engine.admit(make_job("next")))
