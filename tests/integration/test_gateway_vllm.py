"""Laws 1 and 2 against a real vLLM, over a mix of all that clients ask for.

First the mix goes through the gateway to a real vLLM: what is stored are the engine's own tokens. Then vLLM's replies
are played again, to the gateway and to plain LiteLLM: clients of both receive the same bytes.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.gateway_cases import ROUTES, ask, same
from tests.gateway_server import PLAIN_KEY, GatewayServer, running_gateway
from tests.record_vllm_replies import FORCED, TOOL
from tests.replay_upstream import RECORDED, ReplayUpstream, Script
from tests.tee import Exchange, Tee
from tests.vllm_server import VllmProcess

# "500" takes a quarter of an hour on two cores; "250:500" is its second half.
FIRST, _, LAST = os.environ.get("METACLAW_TEST_MIXED", "30").rpartition(":")
NUMBERS = range(int(FIRST or 0), int(LAST))
CLIENTS = 6
ANTHROPIC_TOOL = {"name": "note", "description": "Note a number.", "input_schema": TOOL["function"]["parameters"]}
RESPONSES_TOOL = {"type": "function"} | TOOL["function"]
WORDS = ("why", "é", "日本", "\n", "42", "blue", "🙂", "\t", '"', "</s>")
AGENTS = ("alpha", "beta", "gamma")


def mixed(number: int) -> tuple[str, dict[str, Any]]:
    """Request ``number``: a route and a body, drawn from all kinds."""
    chance = random.Random(number)
    route = chance.choice(list(ROUTES))
    text = f"Question: {' '.join(chance.choices(WORDS, k=6))} case:mixed-{number}"
    body: dict[str, Any] = {"model": "any", "stream": chance.random() < 0.6, "temperature": chance.choice([0.7, 1.0])}
    size = chance.randint(1, 24)
    if route == "responses":
        body |= {"input": text, "max_output_tokens": max(size, 16)}
        return route, body | chance.choice([{}, {}, {"tools": [RESPONSES_TOOL]}, {"instructions": "Be brief."}])
    body |= {"messages": [{"role": "user", "content": text}], "max_tokens": size}
    if route == "messages":
        return route, body | chance.choice([{}, {}, {"tools": [ANTHROPIC_TOOL]}, {"system": "Be brief."}])
    return route, body | chance.choice(
        [
            {},
            {"n": 2},
            {"tools": [TOOL]},
            {"tools": [TOOL], "tool_choice": FORCED},
            {"logprobs": True, "top_logprobs": 2},
            {"stop": ["a", "e"]},
            {"stream_options": {"include_usage": True}} if body["stream"] else {"seed": 4},
        ]
    )


def case_of(exchange: Exchange) -> str:
    return str(exchange.request["messages"][-1]["content"]).rpartition("case:")[2]


def speak(server: GatewayServer, number: int) -> str:
    """Ask; the trace id that the client was told."""
    route, body = mixed(number)
    agent = AGENTS[number % 3]
    headers = {"authorization": f"Bearer {server.key if agent == 'alpha' else server.pool_key}", "x-agent-id": agent}
    response = httpx.post(server.url + ROUTES[route], json=body, headers=headers, timeout=300, verify=False)
    assert response.status_code == 200, response.text
    return response.headers["x-metaclaw-trace-id"]


@pytest.fixture(scope="module")
def spoken(
    tiny_vllm: VllmProcess, free_port: Callable[[], int], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Tee, list[str], GatewayServer]:
    """The mix through our gateway to a real vLLM: what the engine said, which traces the clients were told of."""
    folder: Path = tmp_path_factory.mktemp("mixed")
    quiet: dict[str, Any] = {"skills": {"max_skills": 0}}
    with (
        Tee(tiny_vllm.url) as tee,
        running_gateway(folder, tee.url, free_port(), **quiet) as server,
        ThreadPoolExecutor(CLIENTS) as pool,
    ):
        told = list(pool.map(lambda number: speak(server, number), NUMBERS))
    return tee, told, server


@pytest.mark.timeout(3000)
@pytest.mark.gateway
@pytest.mark.vllm
@pytest.mark.law(2)
def test_stored_tokens_are_the_engines_own(spoken: tuple[Tee, list[str], GatewayServer]) -> None:
    tee, told, server = spoken
    engine = {case_of(exchange): exchange for exchange in tee.exchanges}
    assert len(engine) == len(tee.exchanges) == len(NUMBERS)
    traces = {trace.id: trace for trace in server.traces()}
    assert len(traces) == sum(body.get("n", 1) for _, body in map(mixed, NUMBERS))
    for number, first in zip(NUMBERS, told, strict=True):
        for index, (prompt, ids, logprobs) in engine[f"mixed-{number}"].tokens().items():
            trace = traces.pop(first if index == 0 else f"{first}-{index}")
            assert (trace.prompt_token_ids, trace.response_token_ids) == (prompt, ids)
            assert trace.response_logprobs == logprobs
            assert (trace.agent, trace.route) == (AGENTS[number % 3], mixed(number)[0])
            assert trace.trainable or (trace.reason or "").startswith("guided")
    assert not traces


@pytest.mark.timeout(3000)
@pytest.mark.gateway
@pytest.mark.vllm
@pytest.mark.law(1)
def test_clients_receive_of_these_replies_what_plain_litellm_gives_them(
    spoken: tuple[Tee, list[str], GatewayServer], gateway: GatewayServer, plain_litellm: str, replay: ReplayUpstream
) -> None:
    for exchange in spoken[0].exchanges:
        name = case_of(exchange)
        route, body = mixed(int(name.removeprefix("mixed-")))
        body["model"] = "metaclaw/alpha"  # a name that plain LiteLLM knows as well
        plain = exchange.unasked(keep_logprobs="top_logprobs" in body)
        replay.scripts[name] = Script(plain, exchange.pieces, exchange.status, exchange.content_type)
        same(ask(gateway.url, gateway.key, route, body), ask(plain_litellm, PLAIN_KEY, route, body))


@pytest.mark.parametrize("name", RECORDED)
def test_what_vllm_says_unasked_is_what_was_recorded_of_it(name: str) -> None:
    case = RECORDED[name]
    if case["status"] != 200:
        pytest.skip("an error is the same to everybody")
    rich = Exchange(case["request"], 200, case["type"], [piece.encode() for piece in case["rich"]])
    asked = case["request"]
    if asked.get("return_token_ids"):
        pytest.skip("the client asked for token ids itself")
    plain = Exchange(asked, 200, case["type"], rich.unasked(keep_logprobs=bool(asked.get("logprobs"))))
    recorded = Exchange(asked, 200, case["type"], [piece.encode() for piece in case["plain"]])
    assert [json.dumps(body) for body in plain.bodies()] == [json.dumps(body) for body in recorded.bodies()]
