"""Teachers and hints: the pull is right, and what cannot be asked is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from metaclaw_hooks.types import Sample, SampleTurn
from metaclaw_trainer.advantages import Baseline, estimate
from metaclaw_trainer.batching import datum_of
from metaclaw_trainer.distillation import Distillation, HintPlacer
from metaclaw_trainer.engine_thread import EngineThread
from metaclaw_trainer.errors import TeacherError
from metaclaw_trainer.step import TrainingState, train_step
from transformers import AutoTokenizer

from tests.trainer.engine_parts import as_sampled, random_sample, tiny_settings

KEY = "agent:ada"


@pytest.fixture
def engine(tiny_model: Path, tmp_path: Path) -> Iterator[EngineThread]:
    engine = EngineThread(tiny_settings(tiny_model, tmp_path))
    engine.start()
    engine.call(lambda e: e.create(KEY))
    yield engine
    engine.stop()


def chat_sample(tokenizer: Any, answer: str, hint: str | None, reward: float = 0.0) -> Sample:
    """A prompt as the chat template writes it, and an answer."""
    asked = [{"role": "user", "content": "What is rain?"}]
    text = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    prompt = tokenizer.encode(text, add_special_tokens=False)
    response = tokenizer.encode(answer, add_special_tokens=False)
    turn = SampleTurn("t", len(prompt), (-1.0,) * len(response), reward)
    return Sample("s", "ada", "session", tuple(prompt + response), (turn,), 0, 0, hint)


def test_a_hint_stands_as_a_user_message_right_before_the_answer(tiny_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    sample = chat_sample(tokenizer, "Water from clouds.", "Say it shorter.")
    placed = HintPlacer(tokenizer).place(sample)
    assert placed is not None
    assert tokenizer.decode(placed.targets_N) == "Water from clouds."
    asked = [{"role": "user", "content": "What is rain?"}, {"role": "user", "content": "Say it shorter."}]
    wanted = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    assert tokenizer.decode(placed.input_ids_L[: int(placed.predict_at_N[0]) + 1]) == wanted


def test_a_prompt_without_the_templates_header_has_no_place_for_a_hint(tiny_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    assert HintPlacer(tokenizer).place(replace(random_sample(1), hint="Say it shorter.")) is None
    assert HintPlacer(tokenizer).place(chat_sample(tokenizer, "Yes.", None)) is None


def test_a_hint_pulls_towards_what_it_makes_likelier(engine: EngineThread, tiny_model: Path, tmp_path: Path) -> None:
    settings = tiny_settings(tiny_model, tmp_path, hint_coefficient=1.0, kl_coefficient=0.0)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    sample = as_sampled(engine, [chat_sample(tokenizer, "Water from clouds.", None)])[0]
    sample = replace(sample, hint="Water from clouds.")
    distillation = Distillation(engine, settings)
    ((pull,),) = distillation(KEY, [sample])
    before = engine.call(lambda e: e.logprobs(KEY, [datum_of(sample, [0.0])]))[0]
    state = TrainingState.fresh(0, "ada")
    result = train_step(engine, KEY, state, [sample], 0, settings, teach=distillation)
    assert result.silent is None  # the reward is 0, and yet there is something to learn
    assert result.metrics["kl_hint"] == pytest.approx(float((before - pull.logprobs_N).mean()), rel=1e-3)
    after = engine.call(lambda e: e.logprobs(KEY, [datum_of(sample, [0.0])]))[0]
    wanted = pull.logprobs_N - before  # up where the hint makes it likelier, down where it does not
    assert float(((after - before) * wanted).sum()) > 0


def test_reverse_kl_gradient_is_that_of_the_exact_one_in_expectation() -> None:
    # One step, three tokens: sum over tokens of p (log p - log q) has the gradient sum p (log p - log q) grad log p.
    logits = torch.tensor([0.3, -0.2, 0.5], dtype=torch.float64, requires_grad=True)
    teacher = torch.log_softmax(torch.tensor([1.0, 0.0, -1.0], dtype=torch.float64), 0)
    logp = torch.log_softmax(logits, 0)
    (exact,) = torch.autograd.grad((logp.exp() * (logp - teacher)).sum(), logits, retain_graph=True)
    expected = torch.zeros(3, dtype=torch.float64)
    for token in range(3):  # drawn with probability p: advantage -(now - teacher), loss -A log p
        advantage = -(logp[token] - teacher[token]).detach()
        (one,) = torch.autograd.grad(-advantage * logp[token], logits, retain_graph=True)
        expected += logp[token].exp().detach() * one
    assert torch.allclose(exact, expected)


@pytest.mark.vllm
def test_a_teacher_scores_the_students_own_tokens(
    engine: EngineThread, tiny_vllm: Any, tiny_model: Path, tmp_path: Path
) -> None:
    values = {"teacher_url": tiny_vllm.url, "teacher_model": "metaclaw-base", "teacher_coefficient": 0.5}
    settings = tiny_settings(tiny_model, tmp_path, **values)
    sample = as_sampled(engine, [random_sample(5, rewards=(0.5, -0.5))])[0]
    ((pull,),) = Distillation(engine, settings)(KEY, [sample])
    own = engine.call(lambda e: e.logprobs(None, [datum_of(sample, [0.0, 0.0])]))[0]
    assert (pull.name, pull.coefficient) == ("teacher", 0.5)
    assert torch.allclose(pull.logprobs_N, own, atol=2e-2)  # the teacher is the same base model


@pytest.mark.vllm
def test_a_teacher_with_another_vocabulary_is_refused(
    engine: EngineThread, tiny_vllm: Any, tiny_model: Path, tmp_path: Path
) -> None:
    student = tmp_path / "student"
    student.mkdir()
    for file in tiny_model.iterdir():
        (student / file.name).write_bytes(file.read_bytes())
    tokenizer = json.loads((student / "tokenizer.json").read_text())
    words = tokenizer["model"]["vocab"]
    words["The"], words["What"] = words["What"], words["The"]  # two ids change places
    (student / "tokenizer.json").write_text(json.dumps(tokenizer))
    values = {"teacher_url": tiny_vllm.url, "teacher_model": "metaclaw-base", "teacher_coefficient": 0.5}
    settings = tiny_settings(student, tmp_path, **values)
    with pytest.raises(TeacherError, match="another vocabulary"):
        Distillation(engine, settings)(KEY, [random_sample(5)])


def test_a_teacher_that_does_not_answer_stops_the_step(
    engine: EngineThread, tiny_model: Path, tmp_path: Path, free_port: Any
) -> None:
    values = {"teacher_url": f"http://127.0.0.1:{free_port()}", "teacher_model": "t", "teacher_coefficient": 0.5}
    settings = tiny_settings(tiny_model, tmp_path, **values)
    with pytest.raises(TeacherError, match="cannot be reached"):
        Distillation(engine, settings)(KEY, [random_sample(5)])


def test_without_teacher_or_hint_nothing_is_pulled(engine: EngineThread, tiny_model: Path, tmp_path: Path) -> None:
    samples = [random_sample(5)]
    assert Distillation(engine, tiny_settings(tiny_model, tmp_path))(KEY, samples) == [()]
    assert estimate(samples, Baseline(), tiny_settings(tiny_model, tmp_path)).silent
