"""A mistake becomes a skill: the real gateway and worker, a scripted model behind them (no cloud in a test)."""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from metaclaw_plugin.cli.skills import app
from metaclaw_plugin.skills.query import BLOCK_OPEN
from metaclaw_plugin.worker.scoring import Scorer
from tests.gateway_server import GatewayServer, running_gateway
from tests.scripted_model import ScriptedModel
from tests.worker_stage import worker_context, write_hook

pytestmark = pytest.mark.gateway

QUESTION = "How long is the walk around the lake?"
LESSON = {
    "action": "add",
    "name": "metric-units",
    "description": "Use when a walk, a road or another distance is asked about.",
    "triggers": "how long, how far, walk, distance",
    "body": "Give kilometres first.",
    "reason": "the user had to ask for kilometres",
}


def reply(body: dict[str, Any]) -> str:
    """Miles, until it is told better; a skill, when it is asked for one as the model ``writer``."""
    if body["model"].endswith("writer"):
        return json.dumps({"edits": [LESSON]})
    return "10 km (6.2 miles)." if "Give kilometres first." in json.dumps(body["messages"]) else "6.2 miles."


@pytest.fixture(scope="module")
def model() -> Iterator[ScriptedModel]:
    with ScriptedModel(reply) as running:
        yield running


@pytest.fixture(scope="module")
def server(
    model: ScriptedModel, free_port: Callable[[], int], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[GatewayServer]:
    writer = {"model": "openai/writer", "api_base": f"{model.url}/v1", "api_key": "none"}
    folder = tmp_path_factory.mktemp("skills")
    with running_gateway(
        folder,
        model.url,
        free_port(),
        mode="skills_only",
        deployments=[{"model_name": "writer", "litellm_params": writer}],
        skills={
            "starter": False,
            "reload_interval": 0.05,
            "withheld_share": 0,
            "evolution": {"model": "writer", "min_failures": 1},
        },
    ) as running:
        yield running


def ask(server: GatewayServer, key: str, session: str, *messages: dict[str, Any]) -> str:
    reply = httpx.post(
        f"{server.url}/v1/chat/completions",
        headers={"authorization": f"Bearer {key}", "x-session-id": session},
        json={"model": "openclaw", "messages": list(messages)},
        timeout=60,
    )
    assert reply.status_code == 200, reply.text
    return str(reply.json()["choices"][0]["message"]["content"])


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def score(server: GatewayServer) -> None:
    with worker_context(server.settings) as ctx:
        asyncio.run(Scorer(ctx).round())


def test_a_mistake_is_made_once(server: GatewayServer, model: ScriptedModel, tmp_path: Path) -> None:
    write_hook(
        server.settings.home, "units", "def score_trace(trace): return 1.0 if 'km' in trace.response_text else -1.0\n"
    )
    first = ask(server, server.key, "one", user(QUESTION))
    assert first == "6.2 miles."
    ask(server, server.key, "one", user(QUESTION), {"role": "assistant", "content": first}, user("In km, please."))
    server.new_traces(wait=10, at_least=2)
    score(server)

    config = server.settings.home.parent / "config.yaml"
    evolved = CliRunner().invoke(app, ["evolve", "alpha", "--config", str(config), "--json"], catch_exceptions=False)
    assert evolved.exit_code == 0, evolved.output
    record = json.loads(evolved.stdout)
    assert record["state"] == "applied"
    assert record["generation"] == 1
    asked = next(body for body in model.asked if body["model"].endswith("writer"))
    assert "In km, please." in json.dumps(asked), "the evolver sees what the user said next"
    assert not any(trace.model == "writer" for trace in server.traces()), "the evolver's own call is not captured"

    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        answer = ask(server, server.key, f"later-{time.monotonic()}", user(QUESTION))
        if "km" in answer:
            break
    assert answer == "10 km (6.2 miles)."
    trace = server.new_traces(wait=10)[-1]
    assert [ref.name for ref in trace.skills] == ["metric-units"]
    assert trace.skill_generation == 1
    assert BLOCK_OPEN in trace.messages[0]["content"]
    assert "Give kilometres first." in trace.messages[0]["content"]


@pytest.mark.law(4)
def test_law_4_what_alpha_learned_is_not_shown_to_beta(server: GatewayServer) -> None:
    assert ask(server, server.pool_key, "of-beta", user(QUESTION)) == "6.2 miles."
    trace = server.new_traces(wait=10)[-1]
    assert (trace.agent, trace.skills) == ("beta", ())
    assert BLOCK_OPEN not in json.dumps([dict(message) for message in trace.messages])


@pytest.mark.parametrize("system", [None, "Be kind."])
def test_all_three_routes_inject_the_same_block(
    server: GatewayServer, model: ScriptedModel, system: str | None
) -> None:
    blocks = []
    bodies: dict[str, dict[str, Any]] = {
        "/v1/chat/completions": {
            "messages": [*([{"role": "system", "content": system}] if system else []), user(QUESTION)]
        },
        "/v1/messages": {"messages": [user(QUESTION)], "max_tokens": 50} | ({"system": system} if system else {}),
        "/v1/responses": {"input": QUESTION} | ({"instructions": system} if system else {}),
    }
    for path, body in bodies.items():
        headers = {"authorization": f"Bearer {server.key}", "x-session-id": f"{path}-{system}"}
        reply = httpx.post(f"{server.url}{path}", headers=headers, json=body | {"model": "openclaw"}, timeout=60)
        assert reply.status_code == 200, reply.text
        assert "10 km" in reply.text
        first, said = model.asked[-1]["messages"]
        text = first["content"] if isinstance(first["content"], str) else first["content"][-1]["text"]
        if system:
            assert json.dumps(first).count(system) == 1
        assert said["role"] == "user"
        blocks.append(text[text.index(BLOCK_OPEN) :])
    assert blocks[0] == blocks[1] == blocks[2]


@pytest.mark.law(7)
def test_law_7_each_prompt_of_a_session_extends_the_one_before(server: GatewayServer, model: ScriptedModel) -> None:
    messages = [{"role": "system", "content": "Be kind."}, user("Good morning!")]
    sent: list[list[dict[str, Any]]] = []
    for text in ("And how far is it to the lake?", "Thanks, that was all."):
        answer = ask(server, server.key, "growing", *messages)
        sent.append(model.asked[-1]["messages"])
        messages += [{"role": "assistant", "content": answer}, user(text)]
    ask(server, server.key, "growing", *messages)
    sent.append(model.asked[-1]["messages"])
    for shorter, longer in itertools.pairwise(sent):
        assert longer[: len(shorter)] == shorter
    assert BLOCK_OPEN not in json.dumps(sent[0])
    assert sent[1][3]["content"].startswith("And how far is it to the lake?\n\n" + BLOCK_OPEN)
    assert sent[2][5] == user("Thanks, that was all.")
