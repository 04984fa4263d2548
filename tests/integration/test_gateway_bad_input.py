"""Law 9: bad input gets a clear error in the caller's own dialect and changes nothing; the gateway lives on."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from tests.gateway_cases import ROUTES, ask, request_of
from tests.gateway_server import GatewayServer, running_gateway
from tests.replay_upstream import ReplayUpstream, Script

pytestmark = [pytest.mark.gateway, pytest.mark.law(9)]

MAX_BODY = 2_000_000


@pytest.fixture(scope="module")
def small(
    replay: ReplayUpstream, free_port: Callable[[], int], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[GatewayServer]:
    """A gateway with limits that a test can reach, and a deployment of the owner's own."""
    cloud = {
        "model_name": "cloud",
        "litellm_params": {"model": "openai/gpt-x", "api_base": f"{replay.url}/v1", "api_key": "owner-key"},
    }
    claude = {
        "model_name": "claude",
        "litellm_params": {"model": "anthropic/claude-x", "api_base": replay.url, "api_key": "owner-key"},
    }
    limits = {
        "max_body_bytes": MAX_BODY,
        "max_messages": 50,
        "max_tools": 20,
        "upstream_key_header": "x-upstream-key",
    }
    folder = tmp_path_factory.mktemp("small")
    with running_gateway(folder, replay.url, free_port(), gateway=limits, deployments=[cloud, claude]) as server:
        yield server


def is_error_of(route: str, response: httpx.Response) -> bool:
    """Whether the body is an error as the route's clients know it."""
    body = response.json()
    if route == "messages":
        return body["type"] == "error" and {"type", "message"} <= set(body["error"])
    return {"message", "type"} <= set(body["error"])


def raw(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
BAD: dict[str, tuple[Callable[[str], Any], tuple[int, ...]]] = {
    "no-json": (lambda _: b"{bad", (400,)),
    "empty": (lambda _: b"", (400,)),
    "a-list": (lambda _: b' [{"model": "m"}]', (400,)),
    "a-string": (lambda _: b'"hello"', (400,)),
    "null": (lambda _: b"null", (400,)),
    "invalid-utf8": (lambda _: b'{"model": "m", "messages": "\xff\xfe"}', (400,)),
    "no-messages": (lambda _: {"model": "m", "max_tokens": 5}, (400,)),
    "model-is-no-name": (lambda route: request_of(route, "text-whole", False, model=7), (400,)),
    "another-agent": (lambda route: request_of(route, "text-whole", False, model="metaclaw/beta"), (403,)),
    "a-version": (lambda route: request_of(route, "text-whole", False, model="metaclaw/alpha@v1"), (403,)),
    "too-many-tools": (lambda route: request_of(route, "text-whole", False, tools=[TOOL] * 21), (413,)),
}


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("bad", BAD)
def test_bad_requests_are_refused_in_the_callers_dialect(small: GatewayServer, bad: str, route: str) -> None:
    make, statuses = BAD[bad]
    response = ask(small.url, small.key, route, make(route))
    assert response.status_code in statuses, response.text
    assert is_error_of(route, response), response.text
    assert "Traceback" not in response.text
    assert small.new_traces() == []


@pytest.mark.parametrize("route", ROUTES)
def test_too_many_messages_are_refused(small: GatewayServer, route: str) -> None:
    many = [{"role": "user", "content": "case:text-whole"}] * 51
    body = request_of(route, "", False) | ({"input": many} if route == "responses" else {"messages": many})
    response = ask(small.url, small.key, route, body)
    assert (response.status_code, is_error_of(route, response)) == (413, True)
    assert "50 at most" in response.text


@pytest.mark.parametrize("route", ROUTES)
def test_a_body_that_is_too_long_is_refused(small: GatewayServer, route: str) -> None:
    body = json.dumps(request_of(route, "text-whole", False, padding="x" * MAX_BODY)).encode()
    headers = {"authorization": f"Bearer {small.key}", "content-type": "application/json"}
    response = httpx.post(small.url + ROUTES[route], content=body, headers=headers, timeout=60)
    assert (response.status_code, is_error_of(route, response)) == (413, True)
    assert "max_body_bytes" in response.text


@pytest.mark.parametrize("route", ROUTES)
def test_a_body_that_is_too_long_is_refused_before_its_end_when_it_declares_no_length(
    small: GatewayServer, route: str
) -> None:
    pieces = (b"x" * 500_000 for _ in range(8))
    headers = {"authorization": f"Bearer {small.key}", "content-type": "application/json"}
    response = httpx.post(small.url + ROUTES[route], content=pieces, headers=headers, timeout=60)
    assert (response.status_code, is_error_of(route, response)) == (413, True)


def test_a_million_tools_cost_a_clear_no(small: GatewayServer) -> None:
    body = b'{"model": "m", "messages": [{"role": "user", "content": "hi"}], "tools": [' + b"{}," * 10**6 + b"{}]}"
    assert ask(small.url, small.key, "chat", body).status_code == 413


@pytest.mark.parametrize(
    "odd",
    [
        {"max_tokens": -1},
        {"messages": [{"role": "user", "content": "case:text-whole \ud800"}]},
        {"messages": [{"role": "user", "content": None}, {"role": "user", "content": "case:text-whole"}]},
        {"messages": [{"role": "nobody", "content": "case:text-whole"}]},
        {"messages": [{"content": "case:text-whole"}]},
        {"metadata": {"session_id": ["a"]}},
        {"prompt_cache_key": {"a": 1}},
        {"messages": [[["deep"]]]},
    ],
    ids=str,
)
def test_odd_requests_end_in_an_answer_or_an_error_and_never_in_a_crash(
    small: GatewayServer, odd: dict[str, Any]
) -> None:
    response = ask(small.url, small.key, "chat", request_of("chat", "text-whole", False) | odd)
    assert response.status_code == 200 or is_error_of("chat", response)
    small.new_traces()
    assert ask(small.url, small.key, "chat", request_of("chat", "text-whole", False)).status_code == 200
    assert len(small.new_traces()) == 1


@pytest.mark.parametrize("key", [None, "mc-wrong", "Bearer", "ключ"], ids=["none", "wrong", "word", "not-latin"])
@pytest.mark.parametrize("route", ROUTES)
def test_a_key_that_is_none_is_refused_in_the_callers_dialect(
    small: GatewayServer, route: str, key: str | None
) -> None:
    headers = {} if key is None else {b"authorization": f"Bearer {key}".encode()}
    response = httpx.post(small.url + ROUTES[route], json=request_of(route, "text-whole", False), headers=headers)
    assert (response.status_code, is_error_of(route, response)) == (401, True)


def native_responses(stream: bool) -> Script:
    """What OpenAI's Responses route answers."""
    part = {"type": "output_text", "text": " Analysisura kit", "annotations": []}
    item = {"type": "message", "id": "msg_1", "status": "completed", "role": "assistant", "content": [part]}
    usage = {"input_tokens": 1, "output_tokens": 3, "total_tokens": 4}
    whole = {"id": "resp_1", "object": "response", "created_at": 1760000000, "model": "gpt-x", "status": "completed"}
    whole |= {"output": [item], "parallel_tool_calls": True, "tool_choice": "auto", "tools": [], "usage": usage}
    if not stream:
        body = json.dumps(whole).encode()
        return Script([body], [body])
    begun = whole | {"status": "in_progress", "output": []}
    delta = {"item_id": "msg_1", "output_index": 0, "content_index": 0, "delta": " Analysisura kit"}
    events = [
        {"type": "response.created", "sequence_number": 0, "response": begun},
        {"type": "response.output_text.delta", "sequence_number": 1, **delta},
        {"type": "response.completed", "sequence_number": 2, "response": whole},
    ]
    return Script.stream(*(f"event: {e['type']}\ndata: {json.dumps(e)}\n\n".encode() for e in events))


def native_messages(stream: bool) -> Script:
    """What Anthropic answers: a thought, words and a tool call."""
    said: list[dict[str, Any]] = [
        {"type": "thinking", "thinking": "Hm.", "signature": "c2ln"},
        {"type": "text", "text": "I look."},
        {"type": "tool_use", "id": "toolu_1", "name": "look", "input": {"at": "home"}},
    ]
    head = {"id": "msg_1", "type": "message", "role": "assistant", "model": "claude-x"}
    usage = {"input_tokens": 3, "output_tokens": 5}
    if not stream:
        stop = {"stop_reason": "tool_use", "stop_sequence": None, "usage": usage}
        body = json.dumps(head | {"content": said} | stop).encode()
        return Script([body], [body])
    empty = {"content": [], "stop_reason": None, "stop_sequence": None, "usage": usage}
    events: list[dict[str, Any]] = [{"type": "message_start", "message": head | empty}]
    begun = [said[0] | {"thinking": "", "signature": ""}, {"type": "text", "text": ""}, said[2] | {"input": {}}]
    deltas = [
        {"type": "thinking_delta", "thinking": "Hm."},
        {"type": "text_delta", "text": "I look."},
        {"type": "input_json_delta", "partial_json": '{"at": "home"}'},
    ]
    for place, (block, delta) in enumerate(zip(begun, deltas, strict=True)):
        events.append({"type": "content_block_start", "index": place, "content_block": block})
        events.append({"type": "content_block_delta", "index": place, "delta": delta})
        events.append({"type": "content_block_stop", "index": place})
    events.append(
        {"type": "message_delta", "delta": {"stop_reason": "tool_use", "stop_sequence": None}, "usage": usage}
    )
    events.append({"type": "message_stop"})
    return Script.stream(*(f"event: {e['type']}\ndata: {json.dumps(e)}\n\n".encode() for e in events))


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_anthropic_itself_is_kept_with_what_it_said_thought_and_called(
    small: GatewayServer, replay: ReplayUpstream, stream: bool
) -> None:
    small.new_traces()
    replay.scripts["claude"] = native_messages(stream)
    response = ask(small.url, small.key, "messages", request_of("messages", "claude", stream, model="claude"))
    assert response.status_code == 200, response.text
    (trace,) = small.new_traces()
    assert (trace.model, trace.finish_reason, trace.trainable) == ("claude", "tool_calls", False)
    assert (trace.response["content"], trace.response["reasoning"]) == ("I look.", "Hm.")
    (call,) = trace.response["tool_calls"]
    assert (call["id"], call["function"]["name"]) == ("toolu_1", "look")
    assert json.loads(call["function"]["arguments"]) == {"at": "home"}


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("route", ROUTES)
def test_a_cloud_upstream_is_kept_as_text_that_is_never_trained_on(
    small: GatewayServer, replay: ReplayUpstream, route: str, stream: bool
) -> None:
    small.new_traces()
    name = f"text-{'stream' if stream else 'whole'}"
    if route != "chat":  # OpenAI has the Responses route itself; LiteLLM sends Anthropic's requests there too
        name = "native"
        replay.scripts[name] = native_responses(stream)
    body = request_of(route, name, stream, model="cloud")
    response = ask(small.url, small.key, route, body)
    assert response.status_code == 200, response.text
    (trace,) = small.new_traces()
    assert (trace.model, trace.trainable, trace.prompt_token_ids) == ("cloud", False, None)
    assert "no token ids" in (trace.reason or "")
    assert trace.response["content"] == " Analysisura kit"
    assert trace.response_id
    assert trace.response_id.encode() in response.content
    assert "return_token_ids" not in replay.requests[-1]
    assert replay.headers[-1]["authorization"] == "Bearer owner-key"


def test_the_callers_own_upstream_key_goes_through_and_is_stored_nowhere(
    small: GatewayServer, replay: ReplayUpstream
) -> None:
    secret = "sk-callers-very-own-0123456789"
    body = request_of("chat", "text-whole", False, model="cloud")
    response = ask(small.url, small.key, "chat", body, **{"x-upstream-key": secret})
    assert response.status_code == 200
    assert replay.headers[-1]["authorization"] == f"Bearer {secret}"
    ask(small.url, small.key, "chat", body)
    assert replay.headers[-1]["authorization"] == "Bearer owner-key"
    ask(small.url, small.key, "chat", request_of("chat", "text-whole", False), **{"x-upstream-key": secret})
    assert secret not in replay.headers[-1].values()
    kept = [path for path in small.log.parent.rglob("*") if path.is_file() and secret.encode() in path.read_bytes()]
    assert kept == []


def test_metrics_are_shown_to_the_owner_alone(small: GatewayServer) -> None:
    page = small.url + "/metaclaw/metrics"
    assert httpx.get(page, headers={"authorization": f"Bearer {small.key}"}).status_code == 403
    assert httpx.get(page).status_code == 401
    ask(small.url, small.key, "chat", request_of("chat", "text-whole", False))
    internal = (small.settings.home / "internal.key").read_text()
    shown = httpx.get(page, headers={"authorization": f"Bearer {internal}"})
    assert shown.status_code == 200
    assert 'metaclaw_commit_seconds_count{stored="yes"}' in shown.text
