"""An evaluation against a vLLM that refuses, answers nonsense, or is given damaged traces: what can be judged, is."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from metaclaw_hooks.plugins import Plugins, create_plugin_manager
from metaclaw_hooks.types import AdapterVersion
from sqlalchemy.engine import Engine

from metaclaw_plugin.errors import SamplerRefusedError
from metaclaw_plugin.settings import PublishSettings, Settings
from metaclaw_plugin.store.agents import add_agent
from metaclaw_plugin.store.engine import open_store
from metaclaw_plugin.store.schema import sessions, traces
from metaclaw_plugin.store.traces import insert_traces
from metaclaw_plugin.worker.evaluation import Evaluator
from metaclaw_plugin.worker.sampling import Sampler
from metaclaw_plugin.worker.sanity_set import SANITY_SET
from metaclaw_plugin.worker.verdicts import Decision, Evaluation, decide
from tests.publishing_cases import version_body
from tests.store_cases import a_trace

LENIENT = "def score_trace(trace):\n    return 1.0\n"
HELD_OUT = 4


@dataclass
class ScriptedVllm:
    """Answers as vLLM 0.32 does, in the fields that are read; every token has the same log-probability."""

    context: int = 100  # characters of the longest prompt that is answered
    deaf: set[str] = field(default_factory=set)  # models whose prompts are all refused
    unscored: int = 0  # so many of the next replies are not scored
    nonsense: Any = None  # instead of every answer
    asked: list[str] = field(default_factory=list)

    def __call__(self, request: httpx.Request) -> httpx.Response:
        body = json.loads(request.content)
        if self.nonsense is not None:
            return httpx.Response(200, json=self.nonsense)
        if request.url.path == "/v1/completions":
            if self.unscored:
                self.unscored -= 1
                return _refused()
            return httpx.Response(200, json={"choices": [{"prompt_logprobs": _entries(body["prompt"])}]})
        if "prompt_logprobs" in body:
            return httpx.Response(200, json={"prompt_token_ids": [1, 2], "prompt_logprobs": _entries([1, 2])})
        text = str(body["messages"][-1]["content"])
        self.asked.append(f"{body['model']}: {text[:10]}")
        if body["model"] in self.deaf or len(text) > self.context:
            return _refused()
        choice = {
            "message": {"role": "assistant", "content": "Water that flows."},
            "token_ids": [7, 8],
            "logprobs": {"content": [{"logprob": -2.0}, {"logprob": -2.0}]},
            "finish_reason": "stop",
        }
        return httpx.Response(200, json={"prompt_token_ids": [5, 6], "choices": [choice]})


def _refused() -> httpx.Response:
    return httpx.Response(400, json={"error": {"message": "longer than the maximum context length"}})


def _entries(token_ids: list[int]) -> list[Any]:
    return [None, *({str(token): {"logprob": -2.0}} for token in token_ids[1:])]


@dataclass
class Stage:
    settings: Settings
    engine: Engine
    plugins: Plugins
    http: httpx.AsyncClient
    vllm: ScriptedVllm

    def hold_out(self, *questions: Any) -> None:
        row = {"id": "s", "agent": "ada", "evidence": "x-session-id", "evidence_key": "k", "without_skills": []}
        held = [
            a_trace(id=f"t{i}", agent="ada", session="s", turn=i, messages=({"role": "user", "content": question},))
            for i, question in enumerate(questions)
        ]
        with self.engine.begin() as c:
            c.execute(sessions.insert().values(**row, started_at=1.0, last_at=1.0, held_out=True))
            insert_traces(c, held)

    async def evaluate(self, **publish: Any) -> tuple[Evaluation, Decision]:
        settings = PublishSettings(**publish)
        version: AdapterVersion = version_body(8).version()
        evaluation = await Evaluator(self).evaluate(version, 7, settings)
        return evaluation, decide(8, evaluation, settings)


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    (tmp_path / "hooks").mkdir()
    (tmp_path / "hooks" / "lenient.py").write_text(LENIENT, encoding="utf-8")
    engine = open_store(f"sqlite:///{tmp_path / 'metaclaw.db'}")
    with engine.begin() as c:
        add_agent(c, "ada")
    vllm, plugins = ScriptedVllm(), create_plugin_manager(tmp_path / "hooks", packages=False)
    http = httpx.AsyncClient(transport=httpx.MockTransport(vllm))
    yield Stage(Settings(home=tmp_path), engine, plugins, http, vllm)
    plugins.close()
    engine.dispose()


async def test_a_damaged_held_out_trace_is_left_out_and_counted(stage: Stage) -> None:
    stage.hold_out(*(f"Question {n}" for n in range(HELD_OUT)))
    with stage.engine.begin() as c:
        c.execute(traces.update().where(traces.c.id == "t1").values(body=b"torn"))
    evaluation, decision = await stage.evaluate()
    assert (evaluation.held_out, evaluation.damaged, evaluation.replies) == (HELD_OUT - 1, 1, HELD_OUT - 1)
    assert evaluation.difference is not None
    assert decision.accepted
    assert decision.stored()["damaged"] == 1


async def test_when_every_held_out_trace_is_damaged_sanity_alone_decides(stage: Stage) -> None:
    stage.hold_out("Question")
    with stage.engine.begin() as c:
        c.execute(traces.update().values(body=b"torn"))
    evaluation, decision = await stage.evaluate()
    assert (evaluation.replies, evaluation.kl) == (len(SANITY_SET), 0.0)
    assert "every held-out trace is damaged, so sanity alone decided, serving" in decision.sentence


async def test_a_prompt_that_vllm_refuses_both_sides_is_left_out(stage: Stage) -> None:
    stage.hold_out(*(f"Question {n}" for n in range(HELD_OUT - 1)), "long " * 50)
    evaluation, decision = await stage.evaluate()
    assert (evaluation.replies, evaluation.refused, evaluation.unanswered) == (HELD_OUT - 1, 1, 0)
    assert f"on {HELD_OUT - 1} prompts, serving" in decision.sentence


async def test_a_prompt_that_no_json_can_carry_is_left_out(stage: Stage) -> None:
    stage.hold_out("Question", "Question 2", "Question 3", "half a pair: \ud800", float("nan"))
    evaluation, _ = await stage.evaluate()
    assert (evaluation.replies, evaluation.refused) == (3, 2)


@pytest.mark.parametrize(("max_kl", "accepted"), [(1.0, True), (0.1, False)])
async def test_when_most_prompts_are_refused_plain_questions_are_asked_and_the_decision_says_so(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, max_kl: float, accepted: bool
) -> None:
    """Sanity is measured all the same, so a candidate that strayed does not pass for want of prompts."""
    stage.hold_out("Question", *(f"{n} " + "long " * 50 for n in range(HELD_OUT)))
    real = Sampler.logprobs

    async def unlikely(self: Sampler, *arguments: Any) -> list[float]:
        return [value - 0.5 for value in await real(self, *arguments)]

    monkeypatch.setattr(Sampler, "logprobs", unlikely)
    evaluation, decision = await stage.evaluate(max_kl=max_kl, policy="better")
    assert (evaluation.replies, evaluation.kl, evaluation.difference) == (len(SANITY_SET), 0.5, None)
    assert "vLLM refused 4 of 5 held-out prompts (longer than its context?), so sanity alone" in decision.sentence
    assert decision.accepted is accepted


async def test_a_candidate_that_vllm_refuses_what_it_answers_as_the_serving_version_is_rejected(stage: Stage) -> None:
    stage.hold_out(*(f"Question {n}" for n in range(HELD_OUT)))
    stage.vllm.deaf = {"ada@v8"}
    evaluation, decision = await stage.evaluate()
    assert (evaluation.replies, evaluation.unanswered) == (0, HELD_OUT)
    assert not decision.accepted
    assert "rejected: vLLM refused it 4 prompts that it answered as the serving version" in decision.sentence


async def test_a_vllm_that_refuses_plain_questions_too_judges_nobody(stage: Stage) -> None:
    stage.hold_out("Question")
    stage.vllm.deaf = {"ada@v7", "ada@v8"}
    with pytest.raises(SamplerRefusedError, match="vLLM refused 12 of 12 plain questions to ada@v7: its log says why"):
        await stage.evaluate()


async def test_replies_that_cannot_be_scored_are_left_out_of_the_distance_unless_they_are_most(stage: Stage) -> None:
    stage.hold_out(*(f"Question {n}" for n in range(HELD_OUT)))
    stage.vllm.unscored = 2
    evaluation, _ = await stage.evaluate()
    assert (evaluation.replies, evaluation.kl) == (HELD_OUT, 0.0)
    stage.vllm.unscored = 3
    with pytest.raises(SamplerRefusedError, match="would not score 3 of 4 replies as metaclaw-base"):
        await stage.evaluate()


@pytest.mark.parametrize(
    "nonsense",
    [
        [],
        {},
        {"choices": None},
        {"choices": []},
        {"choices": [None]},
        {"choices": [{"message": "said", "token_ids": [1], "logprobs": {"content": [{"logprob": "much"}]}}]},
        {"choices": [{"prompt_logprobs": 3}], "prompt_token_ids": 3},
        {"choices": [{"message": {}, "token_ids": [], "logprobs": {"content": []}}], "prompt_token_ids": []},
    ],
)
async def test_an_answer_of_another_shape_is_refused_in_words(stage: Stage, nonsense: Any) -> None:
    stage.vllm.nonsense = nonsense
    sampler = Sampler(stage.http, "http://vllm")
    for question in (
        sampler.reply("m", a_trace(messages=({"role": "user", "content": "Speak."},)), 8, 1),
        sampler.logprobs("m", [1, 2, 3], 2),
        sampler.conversation_logprob("m", [{"role": "user", "content": "Speak."}]),
    ):
        with pytest.raises(SamplerRefusedError, match="vLLM at http://vllm"):
            await question
