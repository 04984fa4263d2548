"""Adapters in one engine: made, trained, moved out and in, dropped; and what must never move."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from metaclaw_trainer.adapters import AdapterConfig, OptimiserOptions
from metaclaw_trainer.batching import Datum, datum_of
from metaclaw_trainer.engine_thread import EngineThread
from metaclaw_trainer.errors import (
    AdapterExistsError,
    CheckpointRefusedError,
    EngineError,
    EngineStoppedError,
    InvalidDatumError,
    ModelLoadError,
    NonFiniteError,
    UnknownAdapterError,
    UnknownLossError,
    WrongThreadError,
)
from metaclaw_trainer.lora_engine import LoraEngine
from torch import Tensor

from tests.trainer.engine_parts import random_sample, tiny_settings

STEP = OptimiserOptions(learning_rate=1e-2)


@pytest.fixture(scope="module")
def engine(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineThread]:
    engine = EngineThread(tiny_settings(tiny_model, tmp_path_factory.mktemp("home"), max_hot_adapters=3))
    engine.start()
    yield engine
    engine.stop()


@pytest.fixture(autouse=True)
def _empty(engine: EngineThread) -> Iterator[None]:
    yield
    engine.call(lambda e: [e.drop(key) for key in e.adapters()])


def datums(seed: int = 0, count: int = 2) -> list[Datum]:
    return [datum_of(random_sample(seed + i, rewards=(0.0,)), [1.0 - 1.5 * i]) for i in range(count)]


def train(engine: EngineThread, key: str, seed: int = 0) -> None:
    engine.call(lambda e: e.forward_backward(key, datums(seed), "cross_entropy"))
    engine.call(lambda e: e.optim_step(key, STEP))


def base_weights(e: LoraEngine) -> dict[str, Tensor]:
    named = e.base.model.named_parameters()
    return {name.replace(".base_layer.", "."): p.detach().clone() for name, p in named if ".lora_" not in name}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.law(4)
def test_training_one_adapter_leaves_every_other_and_the_base_bit_identical(engine: EngineThread) -> None:
    for seed, key in enumerate(("ada", "bob")):
        engine.call(lambda e, key=key, seed=seed: e.create(key, seed=seed))
        train(engine, key, seed)
    base, bob = engine.call(base_weights), engine.call(lambda e: e.state("bob"))
    scored = engine.call(lambda e: e.logprobs("bob", datums(5)))
    for seed in range(3):
        train(engine, "ada", seed)
    after = engine.call(lambda e: e.state("bob"))
    assert same(base, engine.call(base_weights))
    assert same(dict(bob.weights), dict(after.weights))
    assert same(dict(bob.moments), dict(after.moments))
    assert all(
        torch.equal(a, b) for a, b in zip(scored, engine.call(lambda e: e.logprobs("bob", datums(5))), strict=True)
    )


def test_the_optimiser_tracks_the_adapters_parameters_and_nothing_else(engine: EngineThread) -> None:
    # The first of the fork's fixes; its fallback once made 33 M embedding parameters trainable that were never saved.
    count = engine.call(lambda e: e.create("ada"))

    def look(e: LoraEngine) -> tuple[str, int, set[str], set[str]]:
        tracked = {id(p) for group in e.shelf.hot["ada"].optimiser.param_groups for p in group["params"]}
        named = dict(e.base.model.named_parameters())
        return (
            e.shelf.hot["ada"].slot.name,
            sum(p.numel() for p in named.values() if id(p) in tracked),
            {name for name, p in named.items() if id(p) in tracked},
            {name for name, p in named.items() if p.requires_grad},
        )

    slot, tracked_count, tracked, trainable = engine.call(look)
    assert tracked_count == count == sum(w.numel() for w in engine.call(lambda e: e.state("ada")).weights.values())
    assert tracked == trainable
    assert all(f".lora_A.{slot}." in name or f".lora_B.{slot}." in name for name in tracked)
    engine.call(lambda e: e.forward_backward("ada", datums()))
    with_gradient = engine.call(lambda e: {n for n, p in e.base.model.named_parameters() if p.grad is not None})
    assert with_gradient == tracked


def test_a_new_adapter_changes_nothing_and_the_same_seed_makes_the_same_one(engine: EngineThread) -> None:
    engine.call(lambda e: [e.create("ada", seed=3), e.create("bob", seed=3), e.create("eve", seed=4)])
    base = engine.call(lambda e: e.logprobs(None, datums()))
    for a, b in zip(base, engine.call(lambda e: e.logprobs("ada", datums())), strict=True):
        assert torch.allclose(a, b, atol=1e-6)
    states = engine.call(lambda e: [dict(e.state(key).weights) for key in ("ada", "bob", "eve")])
    assert same(states[0], states[1])
    assert not same(states[0], states[2])


def test_creating_an_adapter_does_not_touch_the_random_state_of_the_process(engine: EngineThread) -> None:
    before = torch.random.get_rng_state()
    engine.call(lambda e: e.create("ada"))
    assert torch.equal(before, torch.random.get_rng_state())


def test_adapters_of_different_rank_and_targets_live_side_by_side(engine: EngineThread) -> None:
    engine.call(lambda e: e.create("ada", AdapterConfig(2, 8.0, ("q_proj",))))
    engine.call(lambda e: e.create("bob", AdapterConfig(8, 8.0, ("down_proj", "up_proj"))))
    for key in ("ada", "bob"):
        train(engine, key)
    assert {w.shape[0] for n, w in engine.call(lambda e: e.state("ada")).weights.items() if "lora_A" in n} == {2}
    assert not any("q_proj" in name for name in engine.call(lambda e: e.state("bob")).weights)


def test_an_adapter_that_was_paged_out_comes_back_as_it_was_and_trains_on_alike(engine: EngineThread) -> None:
    for key in ("ada", "bob"):
        engine.call(lambda e, key=key: e.create(key))
        train(engine, key)
    engine.call(lambda e: e.page_out("ada"))
    engine.call(lambda e: e.create("eve"))
    train(engine, "ada", 7)  # comes back by itself
    train(engine, "bob", 7)  # never left
    left, stayed = engine.call(lambda e: (e.state("ada"), e.state("bob")))
    assert same(dict(left.weights), dict(stayed.weights))
    assert same(dict(left.moments), dict(stayed.moments))


def test_an_adapter_in_a_place_that_another_had_is_that_adapter_to_the_bit(
    engine: EngineThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("metaclaw_trainer.shelf._ADD_UP_FROM", 1)  # sums with the base weights must not be taken over
    keys, alone = ("a", "b", "c", "d", "e"), {}
    for seed, key in enumerate(keys):
        engine.call(lambda e, key=key, seed=seed: e.create(key, seed=seed))
        for round_ in range(2):
            train(engine, key, 10 * seed + round_)
        alone[key] = engine.call(lambda e, key=key: (e.state(key), e.logprobs(key, datums(9))))
        engine.call(lambda e, key=key: e.drop(key))
    for seed, key in enumerate(keys):  # five in three places, in turns
        engine.call(lambda e, key=key, seed=seed: e.create(key, seed=seed))
    for round_ in range(2):
        for seed, key in enumerate(keys):
            train(engine, key, 10 * seed + round_)
    for key in (*keys, *reversed(keys)):
        state, scored = engine.call(lambda e, key=key: (e.state(key), e.logprobs(key, datums(9))))
        assert same(dict(state.weights), dict(alone[key][0].weights))
        assert same(dict(state.moments), dict(alone[key][0].moments))
        assert all(torch.equal(a, b) for a, b in zip(scored, alone[key][1], strict=True))


def test_a_state_that_was_handed_out_does_not_move_with_the_adapter(engine: EngineThread) -> None:
    engine.call(lambda e: e.create("ada"))
    train(engine, "ada")
    engine.call(lambda e: e.page_out("ada"))
    state = engine.call(lambda e: e.state("ada"))
    kept = {name: tensor.clone() for name, tensor in (state.weights | state.moments).items()}
    train(engine, "ada", 3)
    assert same(dict(state.weights | state.moments), kept)
    assert not same(dict(engine.call(lambda e: e.state("ada")).weights), dict(state.weights))


def test_free_places_hold_no_memory_and_make_room_for_other_shapes(engine: EngineThread) -> None:
    for key, rank in (("a", 4), ("b", 4), ("c", 2)):
        engine.call(lambda e, key=key, rank=rank: e.create(key, AdapterConfig(rank, 8.0, ("q_proj",))))
    engine.call(lambda e: [e.drop(key) for key in ("a", "b", "c")])
    for number, rank in enumerate((16, 17, 18, 19)):
        engine.call(lambda e, n=number, rank=rank: e.create(f"n{n}", AdapterConfig(rank, 8.0, ("q_proj",))))

    def ranks_and_sizes(e: LoraEngine) -> tuple[set[int], int]:
        found = [p for name, p in e.base.model.named_parameters() if ".lora_A." in name]
        return {p.shape[0] for p in found if p.numel()}, sum(p.numel() == 0 for p in found)

    ranks, empty = engine.call(ranks_and_sizes)
    assert ranks == {17, 18, 19}
    assert empty == 0
    assert engine.call(lambda e: sorted(e.shelf.paged)) == ["n0"]


def test_more_adapters_than_fit_are_paged_out_least_recently_used_first(engine: EngineThread) -> None:
    for key in ("a", "b", "c", "d"):
        engine.call(lambda e, key=key: e.create(key))
    assert engine.call(lambda e: sorted(e.shelf.paged)) == ["a"]
    assert engine.call(lambda e: e.adapters()) == ["a", "b", "c", "d"]


def test_an_adapter_with_an_unused_gradient_is_not_paged_out(engine: EngineThread) -> None:
    engine.call(lambda e: e.create("ada"))
    engine.call(lambda e: e.forward_backward("ada", datums()))
    with pytest.raises(EngineError, match="holds a gradient"):
        engine.call(lambda e: e.page_out("ada"))
    for key in ("b", "c", "d"):
        engine.call(lambda e, key=key: e.create(key))
    assert "ada" not in engine.call(lambda e: sorted(e.shelf.paged))


def test_others_come_and_go_between_gradient_and_step(engine: EngineThread) -> None:
    for key in ("ada", "bob"):
        engine.call(lambda e, key=key: e.create(key))
        engine.call(lambda e, key=key: e.forward_backward(key, datums()))
    engine.call(lambda e: e.optim_step("bob", STEP))
    engine.call(lambda e: [e.drop("bob"), e.create("eve")])
    train(engine, "eve", 3)
    engine.call(lambda e: [e.optim_step("ada", STEP), e.create("bob")])
    train(engine, "bob")
    assert same(*(dict(engine.call(lambda e, k=k: e.state(k)).weights) for k in ("ada", "bob"))) is False
    engine.call(lambda e: e.create("new"))
    engine.call(lambda e: e.forward_backward("new", datums()))
    engine.call(lambda e: e.optim_step("new", STEP))
    assert same(*(dict(engine.call(lambda e, k=k: e.state(k)).weights) for k in ("ada", "new")))


def test_a_state_that_does_not_fit_is_refused_and_the_adapter_is_as_it_was(engine: EngineThread) -> None:
    engine.call(lambda e: e.create("ada"))
    train(engine, "ada")
    state = engine.call(lambda e: e.state("ada"))
    for bad in (
        dict(list(state.weights.items())[1:]),
        {name: value[:1] for name, value in state.weights.items()},
        {name: torch.full_like(value, float("nan")) for name, value in state.weights.items()},
    ):
        wrong = type(state)(state.config, bad, state.moments, state.step)
        with pytest.raises(CheckpointRefusedError):
            engine.call(lambda e, wrong=wrong: e.restore("ada", wrong))
        after = engine.call(lambda e: e.state("ada"))
        assert same(dict(after.weights), dict(state.weights))
        assert same(dict(after.moments), dict(state.moments))


def test_bad_input_is_refused_before_anything_is_computed(engine: EngineThread) -> None:
    engine.call(lambda e: e.create("ada"))
    before = engine.call(lambda e: e.state("ada"))
    good = datums()
    outside = Datum(torch.tensor([1, 49152]), torch.tensor([1]), torch.tensor([3]), torch.zeros(1), torch.ones(1))
    long = Datum(
        torch.ones(40000, dtype=torch.int64), torch.tensor([1]), torch.tensor([3]), torch.zeros(1), torch.ones(1)
    )
    nan = Datum(good[0].input_ids_L, torch.tensor([1]), torch.tensor([3]), torch.tensor([float("nan")]), torch.ones(1))
    for bad, error in ((outside, "outside the base model's vocabulary"), (long, "max_sample_tokens"), (nan, "NaN")):
        with pytest.raises(InvalidDatumError, match=error):
            engine.call(lambda e, bad=bad: e.forward_backward("ada", [*good, bad]))
    with pytest.raises(UnknownLossError):
        engine.call(lambda e: e.forward_backward("ada", good, "no-such-loss"))
    with pytest.raises(UnknownAdapterError):
        engine.call(lambda e: e.forward_backward("nobody", good))
    with pytest.raises(AdapterExistsError):
        engine.call(lambda e: e.create("ada"))
    with pytest.raises(EngineError, match="no layer named w_pack; targets here: down_proj"):
        engine.call(lambda e: e.create("bob", AdapterConfig(4, 8.0, ("w_pack",))))
    with pytest.raises(EngineError, match="no gradient"):
        engine.call(lambda e: e.optim_step("ada", STEP))
    assert same(dict(before.weights), dict(engine.call(lambda e: e.state("ada")).weights))


def test_an_infinite_loss_takes_no_step(engine: EngineThread) -> None:
    engine.call(lambda e: e.create("ada"))
    before = engine.call(lambda e: e.state("ada"))
    huge = datum_of(random_sample(1), [3e38])
    with pytest.raises(NonFiniteError):
        engine.call(lambda e: e.forward_backward("ada", [huge, huge], "cross_entropy"))
    with pytest.raises(EngineError, match="no gradient"):
        engine.call(lambda e: e.optim_step("ada", STEP))
    assert same(dict(before.weights), dict(engine.call(lambda e: e.state("ada")).weights))


def test_only_the_owning_thread_touches_the_model(engine: EngineThread) -> None:
    found = engine.call(lambda e: e)
    with pytest.raises(WrongThreadError):
        found.create("ada")
    assert engine.call(lambda e: e.create("ada")) > 0


def test_work_from_many_threads_gives_what_one_thread_gives(engine: EngineThread) -> None:
    # The fork's server shared closures between threads; here each piece of work runs whole, one after the other.
    keys = ["k0", "k1", "k2"]
    engine.call(lambda e: [e.create(key, seed=i) for i, key in enumerate(keys)])
    for key in keys:
        train(engine, key, 1)
    alone = [dict(engine.call(lambda e, key=key: e.state(key)).weights) for key in keys]
    engine.call(lambda e: [e.drop(key) for key in keys])
    engine.call(lambda e: [e.create(key, seed=i) for i, key in enumerate(keys)])
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda key: train(engine, key, 1), keys))
    together = [dict(engine.call(lambda e, key=key: e.state(key)).weights) for key in keys]
    assert all(same(a, b) for a, b in zip(alone, together, strict=True))


def test_the_environment_is_as_it_was_after_the_engine_has_run(tiny_model: Path, tmp_path: Path) -> None:
    before = dict(os.environ)
    engine = EngineThread(tiny_settings(tiny_model, tmp_path, device="cpu"))
    engine.start()
    engine.call(lambda e: e.create("ada"))
    train(engine, "ada")
    assert engine.stop(30)
    assert dict(os.environ) == before


def test_a_stopped_engine_takes_no_work_and_its_thread_is_gone(tiny_model: Path, tmp_path: Path) -> None:
    engine = EngineThread(tiny_settings(tiny_model, tmp_path))
    engine.start()
    assert engine.stop(30)
    with pytest.raises(EngineStoppedError):
        engine.submit(lambda e: e.adapters())
    assert not any(t.name == "lora-engine" and t is engine._thread for t in threading.enumerate())


@pytest.mark.parametrize("what", ["missing", "empty"])
def test_a_base_model_that_is_none_is_said_in_one_line(tmp_path: Path, what: str) -> None:
    folder = tmp_path / "model"
    if what == "empty":
        folder.mkdir()
    engine = EngineThread(tiny_settings(folder, tmp_path))
    with pytest.raises(ModelLoadError, match=r"cannot load the base model .*model"):
        engine.start()


def test_a_gpu_that_is_not_there_is_said_in_one_line(tiny_model: Path, tmp_path: Path) -> None:
    engine = EngineThread(tiny_settings(tiny_model, tmp_path, device="cuda:97"))
    with pytest.raises(ModelLoadError, match=r"device cuda:97 is not there"):
        engine.start()
