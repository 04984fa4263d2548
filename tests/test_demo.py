"""The demo's own arithmetic: prompts, curves, verdicts, and a control whose rewards say nothing."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from demo.__main__ import DemoError, only_demo_in
from demo.lesson import WINDOW, Lesson
from demo.measure import BaseModel, distinct2
from demo.prompts import held_out_prompts, training_prompts
from demo.report import draw_curves, verdict, write_report
from demo.stage import AGENTS, set_stage
from metaclaw_plugin.settings import load_settings


def lesson(rewards: list[float]) -> Lesson:
    talker: Any = SimpleNamespace(agent="brief", requests=0, failures=[])
    stage: Any = None
    return Lesson(talker, stage, "key", 0, rewards)


def report(**changes: Any) -> dict[str, Any]:
    agent = {
        "heldout_before": 0.0,
        "heldout_after": 0.6,
        "base_loglik_before": -2.6,
        "base_loglik_after": -2.9,
        "distinct2_before": 0.9,
        "distinct2_after": 0.88,
        "requests": 10,
        "failed": 0,
        "failures": [],
        "curve": [{"interactions": 16, "reward": 0.0}, {"interactions": 17, "reward": 0.1}],
        "versions": [{"interactions": 17, "version": 1}],
    }
    return {"agents": {"brief": agent | changes}, "seconds": 60.0, "shuffled": False}


def test_held_out_questions_are_never_trained_on() -> None:
    assert not set(held_out_prompts(48)) & set(training_prompts(0))
    assert len(set(held_out_prompts(48))) == 48
    assert sorted(training_prompts(1)) == sorted(training_prompts(2)) != training_prompts(1)


def test_distinct2_counts_word_pairs_once() -> None:
    assert distinct2(["a b a b"]) == pytest.approx(2 / 3)
    assert distinct2(["a b c", "d e f"]) == 1.0
    assert distinct2([]) == 0.0


def test_the_curve_averages_full_windows_and_finds_the_gain() -> None:
    learned = lesson([0.0] * WINDOW + [1.0] * WINDOW)
    assert learned.curve()[0] == (WINDOW, 0.0)
    assert learned.curve()[-1] == (2 * WINDOW, 1.0)
    assert learned.interactions_to_gain() == WINDOW + WINDOW // 2
    assert lesson([0.2] * 40).interactions_to_gain() is None
    assert lesson([0.2] * 40).curve()[-1] == (40, pytest.approx(0.2))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"heldout_after": 0.3}, "less than 0.5"),
        ({"base_loglik_after": -3.4}, "babbles"),
        ({"distinct2_after": 0.5}, "repeat"),
        ({"failed": 1, "failures": ["APIError: gone"]}, "APIError: gone"),
    ],
)
def test_the_verdict_names_what_was_not_reached(changes: dict[str, Any], words: str) -> None:
    assert verdict(report(), shuffled=False) == []
    (problem,) = verdict(report(**changes), shuffled=False)
    assert words in problem


def test_the_control_fails_when_shuffled_rewards_teach() -> None:
    assert verdict(report(heldout_after=0.2), shuffled=True) == []
    assert len(verdict(report(heldout_after=-0.7), shuffled=True)) == 1


def test_the_report_and_the_picture_are_written(tmp_path: Path) -> None:
    write_report(tmp_path, report())
    assert (tmp_path / "report.json").read_text().startswith("{")
    draw_curves(tmp_path / "curves.png", report())
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("shuffled", [False, True])
def test_the_stage_is_a_config_that_loads_with_a_reward_for_each_agent(tmp_path: Path, shuffled: bool) -> None:
    stage = set_stage(tmp_path, tmp_path / "model", shuffled)
    settings = load_settings(stage.config)
    assert settings.vllm.url == stage.vllm
    for agent, file in AGENTS.items():
        path = settings.hooks_path / agent / file
        spec = importlib.util.spec_from_file_location(f"stage_{agent}_{shuffled}", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        texts = ["A cat is a pet.", "A cat is a small animal with soft fur. " * 8]
        rewards = [module.score_trace(SimpleNamespace(response_text=text)) for text in texts]
        sign = 1 if agent == "brief" else -1
        assert rewards == ([None, sign * 1.0] if shuffled else [sign * 1.0, sign * -1.0])


def test_a_second_demo_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    with only_demo_in(tmp_path), pytest.raises(DemoError, match="another demo runs"), only_demo_in(tmp_path):
        pass


def test_the_base_model_finds_a_plain_sentence_likelier_than_noise(smollm_model: Path) -> None:
    model = BaseModel(smollm_model)
    scored: list[int] = []
    plain, noise = (
        model.log_likelihood([("What is the capital of France?", answer)], lambda: scored.append(1))
        for answer in ("The capital of France is Paris.", "Paris kettle France of the seven is lamp.")
    )
    assert 0 > plain > noise + 2
    assert len(scored) == 2
