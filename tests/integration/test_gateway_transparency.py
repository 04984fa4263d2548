"""Law 1: nobody can tell the gateway from plain LiteLLM in front of the same upstream."""

from __future__ import annotations

import json
import re
import threading
from typing import Any

import httpx
import pytest

from tests.gateway_server import PLAIN_KEY, GatewayServer
from tests.replay_upstream import RECORDED, ReplayUpstream, Script

pytestmark = pytest.mark.gateway

ROUTES = {"chat": "/v1/chat/completions", "messages": "/v1/messages", "responses": "/v1/responses"}
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
TOOL_CALL = [
    {"role": "assistant", "content": ""},
    {"content": "I look."},
    {"tool_calls": [{"id": "call_1", "type": "function", "index": 0, "function": {"name": "look", "arguments": ""}}]},
    {"tool_calls": [{"index": 0, "function": {"arguments": '{"at": '}}]},
    {"tool_calls": [{"index": 0, "function": {"arguments": '"home"}'}}]},
]
# LiteLLM makes these anew for every answer.
RANDOM = [
    (rb"msg_[0-9a-f]{8}-[0-9a-f-]{27}", b"msg_R"),
    (rb"resp_[\w=-]{20,}", b"resp_R"),
    (rb"chatcmpl-[0-9a-f]{8}-[0-9a-f-]{27}", b"chatcmpl-R"),
    (rb'"created(_at)?":\s?1[0-9]{9}', b'"created":0'),
    (rb"created=1[0-9]{9}", b"created=0"),  # in the text of an exception
    (rb"rs_[0-9a-f-]{36}|fc_[0-9a-f-]{36}", b"item_R"),
]
# Ours (declared in docs/gateway.md), of the moment, or of the key.
OTHER_HEADERS = re.compile(
    r"x-metaclaw-.*|date|llm_provider-date|x-litellm-(call-id|model-id|key-.*|response-cost-.*|.*duration-ms)"
)


def vllm_events(deltas: list[dict[str, Any]], rich: bool) -> list[bytes]:
    """A stream as vLLM's source writes it, one token to an event."""
    events = []
    for place, delta in enumerate(deltas):
        last = place == len(deltas) - 1
        entry = {"token": "t", "logprob": -0.5, "bytes": [116], "top_logprobs": []}
        choice: dict[str, Any] = {"index": 0, "delta": delta, "logprobs": None}
        if rich and place:
            choice["logprobs"] = {"content": [entry]}
        choice["finish_reason"] = "stop" if last else None
        event = {"id": "chatcmpl-0123456789abcdef", "object": "chat.completion.chunk", "created": 1760000000}
        event |= {"model": "metaclaw-base", "choices": [choice]}
        if place == 0:
            event["prompt_token_ids"] = [1, 2, 3] if rich else None
        else:
            choice["token_ids"] = [100 + place] if rich else None
        events.append(f"data: {json.dumps(event)}\n\n".encode())
    return [*events, b"data: [DONE]\n\n"]


def written(deltas: list[dict[str, Any]], **changes: Any) -> Script:
    return Script(vllm_events(deltas, False), vllm_events(deltas, True), content_type="text/event-stream", **changes)


def request_of(route: str, case: str, stream: bool, **more: Any) -> dict[str, Any]:
    body: dict[str, Any] = {"model": "metaclaw/alpha", "stream": stream}
    if route == "responses":
        body["input"] = f"case:{case}"
    else:
        body["messages"] = [{"role": "user", "content": f"case:{case}"}]
    if route == "messages":
        body["max_tokens"] = 20
    return body | more


def ask(url: str, key: str, route: str, body: Any, **headers: str) -> httpx.Response:
    sent = {"authorization": f"Bearer {key}", "accept-encoding": "identity"} | headers
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"content-type": "application/json"} | sent
    with httpx.Client(timeout=60, verify=False) as client:  # reading all certificates costs more than a request
        return client.post(url + ROUTES[route], content=content, headers=headers)


def same(ours: httpx.Response, plain: httpx.Response) -> None:
    """The two answers are the same to a client."""
    assert ours.status_code == plain.status_code, (ours.text, plain.text)
    assert without_randomness(ours.content) == without_randomness(plain.content)
    assert shown_headers(ours) == shown_headers(plain)


def without_randomness(body: bytes) -> bytes:
    for pattern, constant in RANDOM:
        body = re.sub(pattern, constant, body)
    return body


def shown_headers(response: httpx.Response) -> dict[str, str]:
    shown = {name: value for name, value in response.headers.items() if not OTHER_HEADERS.fullmatch(name)}
    if b"resp_" in response.content:  # LiteLLM encrypts the caller's identity into the id, so that its length varies
        shown.pop("content-length", None)
    return shown


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
