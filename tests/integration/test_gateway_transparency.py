"""Law 1: nobody can tell the gateway from plain LiteLLM in front of the same upstream."""

from __future__ import annotations

import json
import threading
from typing import Any

import httpx
import pytest

from tests.gateway_cases import (
    ROUTES,
    TOOL_CALL,
    ask,
    request_of,
    same,
    vllm_events,
    without_randomness,
    written,
)
from tests.gateway_server import PLAIN_KEY, GatewayServer
from tests.replay_upstream import RECORDED, ReplayUpstream, Script

pytestmark = pytest.mark.gateway

EVERY_CASE = sorted({name.rsplit("-", 1)[0] for name in RECORDED})
OWN_FIELDS = (
    "logprobs",
    "top_logprobs",
    "return_token_ids",
    "n",
    "tools",
)  # what clients of the chat route can ask for
REASONING = [
    {"role": "assistant", "content": ""},
    {"reasoning": "Let me"},
    {"reasoning": " see."},
    {"content": "Four"},
    {"content": "."},
]


@pytest.mark.law(1)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize(
    ("case", "route"),
    [(case, route) for case in EVERY_CASE for route in ROUTES if route == "chat" or not case.startswith("own-")],
)
def test_replies_of_a_real_vllm_arrive_byte_for_byte(
    gateway: GatewayServer, plain_litellm: str, case: str, route: str, stream: bool
) -> None:
    name = f"{case}-{'stream' if stream else 'whole'}"
    asked = RECORDED[name]["request"]
    own = {field: asked[field] for field in OWN_FIELDS if field in asked} if route == "chat" else {}
    body = request_of(route, name, stream, **own)
    same(ask(gateway.url, gateway.key, route, body), ask(plain_litellm, PLAIN_KEY, route, body))


@pytest.mark.law(1)
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("deltas", [REASONING, TOOL_CALL], ids=["reasoning", "tool-call"])
def test_reasoning_and_tool_calls_arrive_byte_for_byte(
    gateway: GatewayServer, plain_litellm: str, replay: ReplayUpstream, route: str, deltas: list[dict[str, Any]]
) -> None:
    replay.scripts["written"] = written(deltas)
    body = request_of(route, "written", True)
    same(ask(gateway.url, gateway.key, route, body), ask(plain_litellm, PLAIN_KEY, route, body))
    trace = gateway.new_traces()[-1]
    assert trace.response_token_ids == tuple(range(101, 100 + len(deltas)))
    assert trace.response.get("reasoning") == ("Let me see." if deltas is REASONING else None)


@pytest.mark.law(1)
@pytest.mark.parametrize("status", [400, 404, 422, 429, 500, 503])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("route", ROUTES)
def test_errors_of_the_upstream_arrive_as_they_are(
    gateway: GatewayServer, plain_litellm: str, replay: ReplayUpstream, route: str, stream: bool, status: int
) -> None:
    error = json.dumps({"error": {"message": f"no {status}", "type": "e", "param": None, "code": status}}).encode()
    replay.scripts["error"] = Script([error], [error], status)
    body = request_of(route, "error", stream)
    same(ask(gateway.url, gateway.key, route, body), ask(plain_litellm, PLAIN_KEY, route, body))
    assert gateway.new_traces() == []


FIRST, *_, LAST = vllm_events([{"role": "assistant", "content": "a"}, {"content": "b"}], True)
BROKEN = {
    "no-json": Script.stream(FIRST, b"data: {nonsense\n\n", LAST),
    "half": Script.stream(FIRST, b'data: {"id": "chatcmpl-0123', ending="abrupt"),
    "no-done": Script.stream(FIRST),
    "empty": Script.stream(),
    "error-inside": Script.stream(FIRST, b'data: {"error": {"message": "out of memory", "code": 500}}\n\n', LAST),
    "no-choices": Script.stream(b'data: {"id": "x", "choices": []}\n\n', LAST),
    "odd-choices": Script.stream(FIRST, b'data: {"id": "x", "choices": 5}\n\n', LAST),
    "whole-garbage": Script([b"<html>"], [b"<html>"], content_type="text/html"),
    "whole-list": Script([b"[1, 2]"], [b"[1, 2]"]),
    "whole-null-choices": Script([b'{"id": "x", "choices": null}'], [b'{"id": "x", "choices": null}']),
}


@pytest.mark.law(1)
@pytest.mark.parametrize("broken", BROKEN)
@pytest.mark.parametrize("route", ROUTES)
def test_a_broken_upstream_looks_the_same_and_leaves_nothing_trainable(
    gateway: GatewayServer, plain_litellm: str, replay: ReplayUpstream, route: str, broken: str
) -> None:
    replay.scripts["broken"] = BROKEN[broken]
    gateway.new_traces()
    body = request_of(route, "broken", not broken.startswith("whole"))
    outcomes = [outcome(url, key, route, body) for url, key in ((gateway.url, gateway.key), (plain_litellm, PLAIN_KEY))]
    assert outcomes[0] == outcomes[1]
    assert not any(trace.trainable for trace in gateway.new_traces(wait=0.5))
    replay.scripts["text-whole"] = Script.recorded("text-whole")
    assert ask(gateway.url, gateway.key, "chat", request_of("chat", "text-whole", False)).status_code == 200


def outcome(url: str, key: str, route: str, body: dict[str, Any]) -> tuple[Any, ...]:
    """All that a client sees, up to the point where it breaks."""
    headers = {"authorization": f"Bearer {key}", "accept-encoding": "identity"}
    received = b""
    try:
        with httpx.stream("POST", url + ROUTES[route], json=body, headers=headers, timeout=60) as response:
            for chunk in response.iter_raw():
                received += chunk
    except httpx.HTTPError as error:
        return response.status_code, without_randomness(received), type(error)
    return response.status_code, without_randomness(received), None


@pytest.mark.law(1)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_an_upstream_that_takes_too_long_ends_alike_and_leaves_nothing(
    gateway: GatewayServer, plain_litellm: str, replay: ReplayUpstream, stream: bool
) -> None:
    replay.scripts["slow"] = Script.recorded(f"text-{'stream' if stream else 'whole'}", delay=15)
    gateway.new_traces()
    body = request_of("chat", "slow", stream, timeout=1)
    ours, plain = ask(gateway.url, gateway.key, "chat", body), ask(plain_litellm, PLAIN_KEY, "chat", body)
    assert ours.status_code == plain.status_code
    assert ours.json()["error"].keys() == plain.json()["error"].keys()
    assert ours.json()["error"]["type"] == plain.json()["error"]["type"]
    assert gateway.new_traces(wait=0.5) == []


@pytest.mark.law(1)
@pytest.mark.parametrize("route", ROUTES)
def test_chunks_come_one_for_one_as_the_upstream_sends_them(
    gateway: GatewayServer, plain_litellm: str, replay: ReplayUpstream, route: str
) -> None:
    """The upstream lets a piece out only after the client has read what can have come of the one before."""
    progress = [
        lockstep(replay, url, key, route) for url, key in ((gateway.url, gateway.key), (plain_litellm, PLAIN_KEY))
    ]
    assert progress[0] == progress[1]


def lockstep(replay: ReplayUpstream, url: str, key: str, route: str) -> list[int]:
    """How many events the client had read when the upstream was about to send its piece i."""
    read: list[bytes] = []
    seen_before_piece: list[int] = []
    settle = 0.4  # seconds in which what was sent arrives

    def step(_: int) -> None:
        threading.Event().wait(settle)
        seen_before_piece.append(b"".join(read).count(b"\n\n"))

    replay.scripts["lockstep"] = written([*TOOL_CALL[:2], {"content": "b"}, {"content": "c"}], step=step)
    body = request_of(route, "lockstep", True)
    headers = {"authorization": f"Bearer {key}", "accept-encoding": "identity"}
    with httpx.stream("POST", url + ROUTES[route], json=body, headers=headers, timeout=60) as response:
        for chunk in response.iter_raw():
            read.append(chunk)
    return seen_before_piece


@pytest.mark.law(1)
def test_image_parts_reach_the_upstream_unharmed_and_are_not_trained_on(
    gateway: GatewayServer, plain_litellm: str, replay: ReplayUpstream
) -> None:
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}}
    parts = [{"type": "text", "text": "case:text-whole"}, image]
    body = request_of("chat", "", False, messages=[{"role": "user", "content": parts}])
    ours = ask(gateway.url, gateway.key, "chat", body)
    sent = replay.requests[-1]["messages"]
    same(ours, ask(plain_litellm, PLAIN_KEY, "chat", body))
    assert sent == replay.requests[-1]["messages"]
    trace = gateway.new_traces()[-1]
    assert (trace.trainable, trace.messages[0]["content"]) == (False, parts)
    assert "image" in (trace.reason or "")
