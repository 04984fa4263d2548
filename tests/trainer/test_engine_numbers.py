"""What the engine computes, against an unfused float64 reference made of PEFT's own layers and plain autograd."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from metaclaw_trainer import forward
from metaclaw_trainer.adapters import AdapterConfig, AdapterState, OptimiserOptions
from metaclaw_trainer.batching import Datum, Pull, datum_of, datum_of_lists, micro_batches
from metaclaw_trainer.engine_thread import EngineThread
from metaclaw_trainer.errors import OutOfMemoryError
from metaclaw_trainer.fused_norm import FusedNorm, fuse_norms
from metaclaw_trainer.losses import LossOptions, find_loss, token_weights
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.trainer.engine_parts import random_sample, tiny_settings

CONFIG = AdapterConfig(4, 8.0, ("down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"))
SUM = LossOptions(importance_cap=2.0)


def mixed_datums() -> list[Datum]:
    """Lengths from 3 to 60, one of them a session of three turns."""
    samples = [
        random_sample(1, (0.5,), prompt=3, response=4),
        random_sample(2, (0.5, -0.5, 1.0), prompt=12, response=8),
        random_sample(3, (-1.0,), prompt=30, response=30),
        random_sample(4, (1.0,), prompt=1, response=2),
    ]
    return [
        datum_of(sample, [turn.reward for turn in sample.turns]).pulled(
            Pull("base", 0.1, torch.linspace(-3.0, -9.0, sum(len(t.logprobs) for t in sample.turns)))
        )
        for sample in samples
    ]


def trained_state(engine: EngineThread) -> AdapterState:
    """An adapter whose B is not zero, so that every gradient counts."""
    engine.call(lambda e: e.create("ada", CONFIG, seed=1))
    state = engine.call(lambda e: e.state("ada"))
    torch.manual_seed(0)
    weights = {name: w + 0.05 * torch.randn_like(w) for name, w in state.weights.items()}
    state = AdapterState(CONFIG, weights, {}, 0)
    engine.call(lambda e: e.restore("ada", state))
    return state


def reference(model: Path, state: AdapterState, datums: Sequence[Datum], loss: str, options: LossOptions):
    """Loss and gradients in float64: whole logits, log_softmax, gather; one graph for each datum."""
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64)
    plain = get_peft_model(
        base, LoraConfig(r=CONFIG.rank, lora_alpha=CONFIG.alpha, target_modules=list(CONFIG.targets), lora_dropout=0.0)
    ).double()
    set_peft_model_state_dict(plain, {name: w.double() for name, w in state.weights.items()})
    weights, total = token_weights([d.predicted for d in datums], options), 0.0
    for weight, datum in zip(weights, datums, strict=True):
        logits = plain(input_ids=datum.input_ids_L[None], use_cache=False).logits[0]
        now = torch.log_softmax(logits, -1)[datum.predict_at_N].gather(1, datum.targets_N[:, None])[:, 0]
        advantages = datum.advantages_N.double()
        for pull in datum.pulls:
            advantages = advantages - pull.coefficient * (now.detach() - pull.logprobs_N.double())
        terms = find_loss(loss)(now, datum.sampled_N.double(), advantages, options)
        value = terms.loss_N.sum() * weight
        value.backward()
        total += float(value.detach())
    gradients = {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}
    return total, {name.replace(".default.", "."): g for name, g in gradients.items()}


def gradients_of(engine: EngineThread) -> dict[str, Tensor]:
    return engine.call(
        lambda e: {n: w.grad.clone() for n, w in zip(e.shelf.hot["ada"].names, e.shelf.hot["ada"].weights, strict=True)}
    )


def distance(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """Relative, L2, over all tensors together."""
    assert found.keys() == wanted.keys()
    apart = sum(float((found[n].double() - wanted[n]).pow(2).sum()) for n in wanted)
    return (apart / sum(float(wanted[n].pow(2).sum()) for n in wanted)) ** 0.5


@pytest.fixture
def make_engine(tiny_model: Path, tmp_path: Path):
    engines: list[EngineThread] = []

    def make(**others: object) -> EngineThread:
        engine = EngineThread(tiny_settings(tiny_model, tmp_path, **others))
        engine.start()
        engines.append(engine)
        return engine

    yield make
    for engine in engines:
        engine.stop()


@pytest.mark.parametrize("added_up", [True, False])
@pytest.mark.parametrize("loss", ["importance_sampling", "ppo", "cispo", "cross_entropy"])
def test_loss_and_gradients_equal_the_reference(
    make_engine, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, loss: str, added_up: bool
) -> None:
    monkeypatch.setattr("metaclaw_trainer.shelf._ADD_UP_FROM", 1 if added_up else 10**9)
    engine = make_engine()
    state = trained_state(engine)
    datums = mixed_datums()
    result = engine.call(lambda e: e.forward_backward("ada", datums, loss, SUM))
    wanted, gradients = reference(tiny_model, state, datums, loss, SUM)
    assert result.loss == pytest.approx(wanted, rel=1e-4)
    assert distance(gradients_of(engine), gradients) < 1e-4


@pytest.mark.parametrize("normalisation", ["token", "sequence", "constant"])
def test_micro_batches_give_the_gradient_of_one_batch(make_engine, normalisation: str) -> None:
    options, found = LossOptions(normalisation=normalisation, normalisation_constant=3.0), []
    for budget, padding in ((1, 0), (100, 100), (100_000, 20), (100_000, 100)):
        engine = make_engine(micro_batch_tokens=budget, padding_limit=padding)
        trained_state(engine)
        result = engine.call(lambda e: e.forward_backward("ada", mixed_datums(), "ppo", options))
        found.append((result.loss, {n: g.double() for n, g in gradients_of(engine).items()}))
    for loss, gradients in found[1:]:
        assert loss == pytest.approx(found[0][0], rel=1e-5)
        assert distance(gradients, found[0][1]) < 1e-5


def test_sequences_share_a_pass_only_within_the_budget_and_the_padding() -> None:
    lengths = (10, 50, 12, 48, 49)
    datums = [datum_of(random_sample(n, (0.0,), prompt=length, response=1), [0.0]) for n, length in enumerate(lengths)]
    assert list(micro_batches(datums, 1000, 5)) == [[1, 4, 3], [2, 0]]
    assert list(micro_batches(datums, 100, 5)) == [[1, 4], [3], [2, 0]]
    assert list(micro_batches(datums, 1000, 0)) == [[1], [4], [3], [2], [0]]
    assert list(micro_batches(datums, 1000, 1000)) == [[1, 4, 3, 2, 0]]
    assert list(micro_batches(datums, 1, 1000)) == [[1], [4], [3], [2], [0]]


def test_two_calls_accumulate_what_one_call_gives(make_engine) -> None:
    engine = make_engine()
    trained_state(engine)
    datums = mixed_datums()
    engine.call(lambda e: e.forward_backward("ada", datums, "ppo", LossOptions()))
    whole = {n: g.double() for n, g in gradients_of(engine).items()}
    engine.call(lambda e: e.zero_grad("ada"))
    engine.call(lambda e: e.forward_backward("ada", datums[:1], "ppo", LossOptions()))
    engine.call(lambda e: e.forward_backward("ada", datums[1:], "ppo", LossOptions()))
    assert distance(gradients_of(engine), whole) < 1e-5


def test_recomputed_activations_give_the_same_gradient_without_a_cache(
    make_engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The fork's third fix: a KV cache beside recomputed activations is wrong, and a silent cost without them.
    made: list[int] = []
    from transformers.cache_utils import DynamicCache

    real = DynamicCache.__init__
    monkeypatch.setattr(DynamicCache, "__init__", lambda self, *a, **k: (made.append(1), real(self, *a, **k))[1])
    found = []
    for recompute in (False, True):
        engine = make_engine(gradient_checkpointing=recompute)
        trained_state(engine)
        engine.call(lambda e: e.forward_backward("ada", mixed_datums(), "ppo", SUM))
        found.append({n: g.double() for n, g in gradients_of(engine).items()})
        trainable = engine.call(lambda e: [n for n, p in e.base.model.named_parameters() if p.requires_grad])
        assert all(".lora_" in name for name in trainable)
        assert engine.call(lambda e: e.base.model.training) is False
    assert distance(found[1], found[0]) < 1e-6
    assert not made


def test_recomputing_keeps_fewer_activations(make_engine) -> None:
    engine = make_engine()
    trained_state(engine)
    long = datum_of(random_sample(9, (1.0,), prompt=200, response=20), [1.0])

    def saved_bytes(e, recompute: bool) -> int:
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: (sizes.append(t.numel() * t.element_size()), t)[1], lambda t: t
        ):
            e.settings = e.settings.model_copy(update={"gradient_checkpointing": recompute})
            e.shelf.activate("ada")
            e._score([long], differentiate=True)
        return sum(size for size in sizes if size < 1_000_000)  # not the head's frozen weights

    assert engine.call(lambda e: saved_bytes(e, True)) < 0.5 * engine.call(lambda e: saved_bytes(e, False))


def test_logprobs_are_those_before_temperature(make_engine, tiny_model: Path) -> None:
    # The fork's second fix. A model whose generation settings ask for a temperature is scored without it all the same.
    engine = make_engine()
    datum = mixed_datums()[2]
    engine.call(lambda e: setattr(e.base.model.generation_config, "temperature", 0.1))
    found = engine.call(lambda e: e.logprobs(None, [datum]))[0]
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float64)
    with torch.no_grad():
        logits = model(input_ids=datum.input_ids_L[None]).logits[0]
    wanted = torch.log_softmax(logits, -1)[datum.predict_at_N].gather(1, datum.targets_N[:, None])[:, 0]
    assert torch.allclose(found.double(), wanted, atol=1e-4)
    tempered = torch.log_softmax(logits / 0.1, -1)[datum.predict_at_N].gather(1, datum.targets_N[:, None])[:, 0]
    assert not torch.allclose(found.double(), tempered, atol=1.0)


def test_a_merged_session_scores_every_turn_as_its_own_request_would(make_engine) -> None:
    engine = make_engine()
    trained_state(engine)
    session = random_sample(11, rewards=(0.1, 0.2, 0.3), prompt=9, response=7)
    whole = engine.call(lambda e: e.logprobs("ada", [datum_of(session, [0.0] * 3)]))[0].split(7)
    for turn, together in zip(session.turns, whole, strict=True):
        tokens = list(session.token_ids[: turn.end])
        inside = [turn.start <= i < turn.end for i in range(1, len(tokens))]
        alone = datum_of_lists(tokens[:-1], tokens[1:], [-1.0 * i for i in inside], [1.0 * i for i in inside])
        found = engine.call(lambda e, alone=alone: e.logprobs("ada", [alone]))[0]
        assert torch.allclose(found, together, atol=1e-4)


def test_entropy_and_pull_metrics_are_right(make_engine) -> None:
    engine = make_engine()
    trained_state(engine)
    datum = mixed_datums()[0]
    result = engine.call(lambda e: e.forward_backward("ada", [datum], "ppo", SUM))
    apart = (result.logprobs[0] - datum.pulls[0].logprobs_N).mean()
    assert result.metrics["kl_base"] == pytest.approx(float(apart), rel=1e-5)
    ratio = torch.exp(result.logprobs[0] - datum.sampled_N).mean()
    assert result.metrics["ratio"] == pytest.approx(float(ratio), rel=1e-5)

    def entropy(e) -> float:
        e.shelf.activate("ada")
        with torch.no_grad():
            logits = e.base.model(input_ids=datum.input_ids_L[None]).logits[0][datum.predict_at_N]
        logp = torch.log_softmax(logits.double(), -1)
        return float(-(logp.exp() * logp).sum(-1).mean())

    assert result.metrics["entropy"] == pytest.approx(engine.call(entropy), rel=1e-4)


def test_a_response_longer_than_the_kept_softmax_is_differentiated_alike(
    make_engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine()
    trained_state(engine)
    datums = mixed_datums()
    engine.call(lambda e: e.forward_backward("ada", datums, "ppo", SUM))
    whole = {n: g.double() for n, g in gradients_of(engine).items()}
    monkeypatch.setattr("metaclaw_trainer.forward.KEEP_ROWS", 7)
    engine.call(lambda e: e.zero_grad("ada"))
    engine.call(lambda e: e.forward_backward("ada", datums, "ppo", SUM))
    assert distance(gradients_of(engine), whole) < 1e-6


def test_norms_are_fused_where_that_computes_the_same(tiny_model: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).requires_grad_(False)
    norm = model.base_model.norm
    norm.weight.copy_(torch.linspace(0.5, 2.0, norm.weight.shape[0]))
    names = [name for name, _ in model.named_parameters()]
    x = torch.randn(3, 5, norm.weight.shape[0], requires_grad=True)
    along = torch.randn_like(x)
    wanted = norm(x)
    [wanted_gradient] = torch.autograd.grad(wanted, x, along)
    layers = model.config.num_hidden_layers
    assert fuse_norms(model) == 2 * layers + 1
    fused = model.base_model.norm
    assert isinstance(fused, FusedNorm)
    assert torch.allclose(fused(x), wanted, atol=1e-6)
    assert torch.allclose(torch.autograd.grad(fused(x), x, along)[0], wanted_gradient, atol=1e-5)
    assert [name for name, _ in model.named_parameters()] == names
    assert fuse_norms(model) == 0

    class Shifted(type(norm)):  # type: ignore[misc]  # as in Gemma
        def forward(self, states: Tensor) -> Tensor:
            return super().forward(states) * 2.0

    model.base_model.norm = Shifted(norm.weight.shape[0])
    assert fuse_norms(model) == 0


def test_peft_reads_the_weights_under_their_own_names(make_engine, tiny_model: Path) -> None:
    engine = make_engine()
    state = trained_state(engine)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32), CONFIG.to_peft(str(tiny_model))
    )
    outcome = set_peft_model_state_dict(model, dict(state.weights))
    assert not outcome.unexpected_keys  # type: ignore[attr-defined]
    assert get_peft_model_state_dict(model).keys() == state.weights.keys()


def test_the_sum_with_the_base_weights_follows_every_step_and_every_adapter(
    make_engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    datums, found = mixed_datums(), []
    for smallest in (1, 10**9):
        monkeypatch.setattr("metaclaw_trainer.shelf._ADD_UP_FROM", smallest)
        engine = make_engine()
        trained_state(engine)
        engine.call(lambda e: e.create("bob", AdapterConfig(2, 4.0, ("q_proj",)), seed=9))
        for key in ("ada", "bob", "ada"):
            engine.call(lambda e, key=key: e.forward_backward(key, datums, "ppo", SUM))
            engine.call(lambda e, key=key: e.optim_step(key, OptimiserOptions(1e-2)))
        engine.call(lambda e: e.restore("bob", e.state("bob")))
        found.append(
            engine.call(lambda e: [*e.logprobs("ada", datums), *e.logprobs("bob", datums), *e.logprobs(None, datums)])
        )
    assert all(torch.allclose(a, b, atol=1e-3) for a, b in zip(*found, strict=True))
    assert not torch.allclose(found[0][0], found[0][-4], atol=1e-1)


def test_out_of_memory_is_survived_with_smaller_pieces(make_engine, monkeypatch: pytest.MonkeyPatch) -> None:
    datums, real, sizes = mixed_datums(), forward.score, []

    def small_device(model: object, group: Sequence[Datum], device: torch.device):
        sizes.append(len(group))
        if len(group) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return real(model, group, device)

    engine = make_engine(micro_batch_tokens=100_000, padding_limit=100)
    trained_state(engine)
    engine.call(lambda e: e.forward_backward("ada", datums, "ppo", SUM))
    once = {n: g.double() for n, g in gradients_of(engine).items()}
    monkeypatch.setattr("metaclaw_trainer.lora_engine.score", small_device)
    engine.call(lambda e: e.forward_backward("ada", datums, "ppo", SUM))  # on top of the gradient that is there
    assert sizes == [4, 1, 1, 1, 1]
    assert distance(gradients_of(engine), {n: 2 * g for n, g in once.items()}) < 1e-5


def test_out_of_memory_to_the_end_leaves_gradient_and_adapter_as_they_were(
    make_engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = forward.score

    def tiny_device(model: object, group: Sequence[Datum], device: torch.device):
        if group[0].length > 20:
            raise RuntimeError(
                "[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory: you tried"
            )
        return real(model, group, device)

    engine = make_engine(micro_batch_tokens=1)
    state = trained_state(engine)
    datums = mixed_datums()
    engine.call(lambda e: e.forward_backward("ada", [datums[3]], "ppo", SUM))
    before = gradients_of(engine)
    monkeypatch.setattr("metaclaw_trainer.lora_engine.score", tiny_device)
    with pytest.raises(OutOfMemoryError, match="out of memory"):
        engine.call(lambda e: e.forward_backward("ada", [datums[3], datums[2]], "ppo", SUM))
    after = gradients_of(engine)
    assert all(torch.equal(before[name], after[name]) for name in before)
    now = engine.call(lambda e: e.state("ada"))
    assert all(torch.equal(state.weights[name], now.weights[name]) for name in now.weights)
