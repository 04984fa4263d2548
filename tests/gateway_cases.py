"""Requests to the gateway and to plain LiteLLM, and when two answers are the same to a client."""

from __future__ import annotations

import json
import re
from typing import Any

import httpx

from tests.replay_upstream import Script

ROUTES = {"chat": "/v1/chat/completions", "messages": "/v1/messages", "responses": "/v1/responses"}
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
