"""The judge as a user has it: any model of the real gateway, asked by a real worker; the model itself is scripted."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from metaclaw_hooks.types import Reward

from metaclaw_plugin.store.counters import read_counters
from metaclaw_plugin.store.rewards import score_again
from metaclaw_plugin.store.traces import rewards_of
from metaclaw_plugin.worker.context import WorkerContext
from metaclaw_plugin.worker.scoring import Scorer, store_hook_counters
from tests.gateway_server import GatewayServer, running_gateway
from tests.scripted_model import ScriptedModel
from tests.worker_stage import rows, worker_context

pytestmark = pytest.mark.gateway

BAD_HOUR = {"on": ""}  # how the judge's model misbehaves: "429", "prose", "refusal"


def reply(body: dict[str, Any]) -> str | tuple[int, str]:
    """The agent's answers, and the verdicts of a judge that reads what the user said next."""
    if not body["model"].endswith("arbiter"):
        return "The meeting is on 4/3."
    if BAD_HOUR["on"] == "429":
        return 429, "slow down"
    if BAD_HOUR["on"] == "prose":
        return "What a lovely answer that was!"
    if BAD_HOUR["on"] == "refusal":
        return "I am sorry, but I cannot help with that."
    if "use ISO dates" in body["messages"][1]["content"].split("<<<what came after>>>")[1]:
        return json.dumps(
            {"rationale": "the user corrected the date", "score": -1, "hint": "Write dates as in ISO 8601."}
        )
    return json.dumps({"rationale": "it answers", "score": 1, "hint": ""})


@pytest.fixture(scope="module")
def model() -> Iterator[ScriptedModel]:
    with ScriptedModel(reply) as running:
        yield running


@pytest.fixture(scope="module")
def server(
    model: ScriptedModel, free_port: Callable[[], int], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[GatewayServer]:
    arbiter = {
        "model": "openai/arbiter",
        "api_base": f"{model.url}/v1",
        "api_key": "none",
        "input_cost_per_token": 0.001,
        "output_cost_per_token": 0.002,
    }
    with running_gateway(
        tmp_path_factory.mktemp("judge"),
        model.url,
        free_port(),
        mode="skills_only",
        deployments=[{"model_name": "arbiter", "litellm_params": arbiter}],
        skills={"max_skills": 0},
        rewards={"judge": {"model": "arbiter", "votes": 3, "retries": 1, "timeout": 20}},
        worker={"evidence_timeout": 0.0},
    ) as running:
        yield running


def ask(server: GatewayServer, session: str, *said: str) -> None:
    messages: list[dict[str, str]] = []
    for text in said:
        messages.append({"role": "user", "content": text})
        answer = httpx.post(
            f"{server.url}/v1/chat/completions",
            headers={"authorization": f"Bearer {server.key}", "x-session-id": session},
            json={"model": "openclaw", "messages": messages},
            timeout=60,
        )
        assert answer.status_code == 200, answer.text
        messages.append({"role": "assistant", "content": answer.json()["choices"][0]["message"]["content"]})


def judged(ctx: WorkerContext) -> dict[str, dict[str, Reward]]:
    """Score all that waits; opinions by trace and source."""
    asyncio.run(Scorer(ctx).round())
    with ctx.engine.connect() as c:
        return {trace: {r.source: r for r in rewards_of(c, trace)} for (trace,) in rows(ctx.engine, "id")}


def test_the_judge_reads_the_next_message_through_the_gateway_and_leaves_a_hint(
    server: GatewayServer, model: ScriptedModel
) -> None:
    ask(server, "corrected", "When is the meeting?", "no, that's wrong, use ISO dates")
    first, second = sorted(server.new_traces(wait=10, at_least=2), key=lambda trace: trace.turn)
    with worker_context(server.settings) as ctx:
        opinions = judged(ctx)
        verdict = opinions[first.id]["judge"]
        assert (verdict.value, verdict.confidence, verdict.hint) == (-1.0, 1.0, "Write dates as in ISO 8601.")
        assert opinions[second.id]["judge"].value == 1.0
        stored = {row[0]: row[1:] for row in rows(ctx.engine, "id", "reward", "hint")}
        assert stored[first.id][0] < -0.5
        assert stored[first.id][1] == "Write dates as in ISO 8601."
        with ctx.engine.connect() as c:
            counted = read_counters(c)
    calls = [body for body in model.asked if body["model"].endswith("arbiter")]
    assert len(calls) == 6, "three votes on each of two replies"
    assert calls[0]["response_format"]["json_schema"]["name"] == "verdict", "LiteLLM passes the schema on"
    assert {trace.id for trace in server.traces()} == {first.id, second.id}, "the judge's own calls are not captured"
    [(_, spent)] = counted["judge_calls"].items()
    assert spent == 6
    [(_, microdollars)] = counted["judge_microdollars"].items()
    assert microdollars == 6 * 15_000, "5 tokens in at 0.001 and 5 out at 0.002 dollars, as LiteLLM says"


@pytest.mark.parametrize("trouble", ["429", "prose", "refusal"])
def test_a_judge_in_a_bad_hour_costs_only_its_own_opinion(
    server: GatewayServer, model: ScriptedModel, trouble: str, caplog: pytest.LogCaptureFixture
) -> None:
    BAD_HOUR["on"] = trouble
    session = f"during-{trouble}"
    try:
        ask(server, session, f"When is the {trouble} meeting?", "Thanks, perfect!")  # traffic goes on
        server.new_traces(wait=10, at_least=2)
        with worker_context(server.settings) as ctx:
            opinions = judged(ctx)
            store_hook_counters(ctx)
            mine = [row for row in rows(ctx.engine, "id", "turn", "score", "reward") if _is_of(server, row[0], trouble)]
            (first, _, score, reward), (second, _, other, _) = sorted(mine, key=lambda row: row[1])
            assert "judge" not in opinions[first]
            assert (score, reward) == ("scored", 0.8), "the other rewards have an opinion all the same"
            assert (other, opinions[second]) == ("unscored", {}), "no opinion is not a reward of 0"
            with ctx.engine.connect() as c:
                assert read_counters(c, "hook_failures")["hook_failures"]["judge:score_trace"] >= 2
        named = [
            r.getMessage() for r in caplog.records if r.getMessage().startswith("plugin judge: score_trace failed")
        ]
        assert named
        assert ("429" if trouble == "429" else "was a verdict") in named[0]
    finally:
        BAD_HOUR["on"] = ""
    with worker_context(server.settings) as ctx:
        with ctx.engine.begin() as c:
            score_again(c, "alpha", trace_id=second)
        assert judged(ctx)[second]["judge"].value == 1.0, "a bad hour is not kept for ever"


def _is_of(server: GatewayServer, trace_id: str, trouble: str) -> bool:
    trace = next(trace for trace in server.traces() if trace.id == trace_id)
    return f"the {trouble} meeting" in json.dumps([dict(message) for message in trace.messages])
