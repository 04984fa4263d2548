"""What the gateway keeps of an exchange, seen from outside: the store, after a client got its answer."""

from __future__ import annotations

import json
import re
import sqlite3
import threading
from typing import Any

import anthropic
import httpx
import openai
import pytest

from tests.gateway_cases import ROUTES, TOOL_CALL, ask, request_of, vllm_events, written
from tests.gateway_server import GatewayServer
from tests.replay_upstream import RECORDED, ReplayUpstream, Script

pytestmark = pytest.mark.gateway


def recorded_tokens(name: str) -> dict[int, tuple[tuple[int, ...], tuple[float, ...]]]:
    """Choice -> token ids and log-probabilities, read out of the recorded reply without our code."""
    found: dict[int, tuple[list[int], list[float]]] = {}
    for piece in RECORDED[name]["rich"]:
        payload = piece.removeprefix("data: ").strip()
        for choice in [] if payload == "[DONE]" else json.loads(payload)["choices"]:
            ids, logprobs = found.setdefault(choice["index"], ([], []))
            ids.extend(choice.get("token_ids") or ())
            logprobs.extend(entry["logprob"] for entry in (choice["logprobs"] or {"content": ()})["content"])
    return {index: (tuple(ids), tuple(logprobs)) for index, (ids, logprobs) in found.items()}


@pytest.mark.law(2)
@pytest.mark.law(3)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("route", ROUTES)
def test_when_the_client_has_its_last_byte_the_exact_trace_is_in_the_store(
    gateway: GatewayServer, route: str, stream: bool
) -> None:
    name = f"text-{'stream' if stream else 'whole'}"
    gateway.new_traces()
    response = ask(gateway.url, gateway.key, route, request_of(route, name, stream))
    (trace,) = gateway.new_traces()
    assert (trace.response_token_ids, trace.response_logprobs) == recorded_tokens(name)[0]
    assert (trace.agent, trace.route, trace.adapter_version) == ("alpha", route, 0)
    assert (trace.trainable, trace.reason) == (True, None)
    assert (trace.sampling.temperature, trace.sampling.top_p) == (1.0, 1.0)
    assert trace.id == response.headers["x-metaclaw-trace-id"]
    assert response.headers["x-metaclaw-adapter"] == "alpha@v0"
    assert trace.response_id
    assert trace.response_id.encode() in response.content
    assert trace.started_at <= trace.finished_at


@pytest.mark.law(2)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_several_choices_become_traces_that_share_a_request(gateway: GatewayServer, stream: bool) -> None:
    name = f"two-choices-{'stream' if stream else 'whole'}"
    gateway.new_traces()
    ask(gateway.url, gateway.key, "chat", request_of("chat", name, stream, n=2))
    traces = gateway.new_traces()
    assert len(traces) == 2
    assert len({trace.id for trace in traces}) == 2
    assert len({trace.request_id for trace in traces}) == 1
    assert {(t.response_token_ids, t.response_logprobs) for t in traces} == set(recorded_tokens(name).values())


def test_what_the_client_set_stands_and_what_it_left_open_is_filled_in(
    gateway: GatewayServer, replay: ReplayUpstream
) -> None:
    gateway.new_traces()
    ask(gateway.url, gateway.key, "chat", request_of("chat", "text-whole", False, temperature=0.3, seed=5))
    assert replay.requests[-1].items() >= {"temperature": 0.3, "top_p": 1.0, "seed": 5}.items()
    assert replay.requests[-1]["model"] == "metaclaw-base"
    assert "outside" in (gateway.new_traces()[-1].reason or "")


@pytest.mark.law(3)
@pytest.mark.parametrize("route", ROUTES)
def test_a_client_that_leaves_in_mid_stream_leaves_a_trace_that_is_cut_off(
    gateway: GatewayServer, replay: ReplayUpstream, route: str
) -> None:
    events = vllm_events([{"role": "assistant", "content": ""}, {"content": "a"}, {"content": "b"}], rich=True)[:2]
    replay.scripts["hang"] = Script.stream(*events, ending="hang")
    gateway.new_traces()
    headers = {"authorization": f"Bearer {gateway.key}"}
    body = request_of(route, "hang", True)
    with httpx.stream("POST", gateway.url + ROUTES[route], json=body, headers=headers, timeout=30) as response:
        received = b""
        for chunk in response.iter_raw():
            received += chunk
            if b'"a"' in received:
                break
    (trace,) = gateway.new_traces(wait=10)
    assert (trace.trainable, trace.finish_reason, trace.response_token_ids) == (False, None, (101,))
    assert "cut off" in (trace.reason or "")


@pytest.mark.parametrize("route", ROUTES)
def test_on_request_nothing_is_kept(gateway: GatewayServer, replay: ReplayUpstream, route: str) -> None:
    gateway.new_traces()
    body = request_of(route, "text-whole", False)
    response = ask(gateway.url, gateway.key, route, body, **{"x-metaclaw-record": "no"})
    assert response.status_code == 200
    assert "x-metaclaw-trace-id" not in response.headers
    assert "return_token_ids" not in replay.requests[-1]
    assert replay.requests[-1]["model"] == "metaclaw-base"
    assert gateway.new_traces(wait=0.5) == []


class TestOfficialClients:
    """The clients that people really use; each speaks for itself."""

    def test_openai_chat_goes_on_as_one_session(self, gateway: GatewayServer, replay: ReplayUpstream) -> None:
        client = openai.OpenAI(base_url=f"{gateway.url}/v1", api_key=gateway.key, max_retries=0)
        replay.scripts["loop"] = written(TOOL_CALL)
        messages: list[Any] = [{"role": "user", "content": "Openai, please look at home. case:loop"}]
        gateway.new_traces()
        stream = client.chat.completions.create(model="openclaw", messages=messages, stream=True)
        pieces = [chunk.choices[0].delta for chunk in stream if chunk.choices]
        arguments = "".join(c.function.arguments or "" for d in pieces for c in d.tool_calls or () if c.function)
        assert json.loads(arguments) == {"at": "home"}
        call = {"id": "call1", "type": "function", "function": {"name": "look", "arguments": arguments}}
        messages += [{"role": "assistant", "content": "I look.", "tool_calls": [call]}]
        messages += [{"role": "tool", "tool_call_id": "call1", "content": "A table. case:text-whole"}]
        answer = client.chat.completions.create(model="openclaw", messages=messages)
        messages += [{"role": "assistant", "content": answer.choices[0].message.content}]
        messages += [{"role": "user", "content": "And now? case:text-whole"}]
        client.chat.completions.create(model="openclaw", messages=messages)
        first, second, third = gateway.new_traces()
        assert first.session == second.session == third.session
        assert [(t.turn, t.exchange) for t in (first, second, third)] == [(0, 0), (1, 0), (2, 1)]
        assert second.response_id == answer.id

    def test_openai_responses_stream(self, gateway: GatewayServer) -> None:
        client = openai.OpenAI(base_url=f"{gateway.url}/v1", api_key=gateway.key, max_retries=0)
        gateway.new_traces()
        events = list(client.responses.create(model="gpt", input="case:text-stream", stream=True))
        (trace,) = gateway.new_traces()
        assert trace.response["content"] == "".join(e.delta for e in events if e.type == "response.output_text.delta")

    def test_anthropic_messages_stream(self, gateway: GatewayServer) -> None:
        client = anthropic.Anthropic(base_url=gateway.url, api_key=gateway.key, max_retries=0)
        gateway.new_traces()
        messages: list[Any] = [{"role": "user", "content": "case:text-stream"}]
        with client.messages.stream(model="claude", max_tokens=9, system="Be brief.", messages=messages) as stream:
            text = "".join(stream.text_stream)
        (trace,) = gateway.new_traces()
        assert trace.response["content"] == text
        assert trace.messages[0] == {"role": "system", "content": "Be brief."}

    def test_errors_are_the_clients_own_kinds(self, gateway: GatewayServer) -> None:
        openai_client = openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="mc-wrong", max_retries=0)
        with pytest.raises(openai.AuthenticationError):
            openai_client.chat.completions.create(model="m", messages=[{"role": "user", "content": "hi"}])
        anthropic_client = anthropic.Anthropic(base_url=gateway.url, api_key="mc-wrong", max_retries=0)
        with pytest.raises(anthropic.AuthenticationError) as error:
            anthropic_client.messages.create(model="m", max_tokens=1, messages=[{"role": "user", "content": "hi"}])
        assert isinstance(error.value.body, dict)
        assert error.value.body["type"] == "error"


@pytest.mark.law(4)
def test_many_agents_at_once_get_each_their_own_traces(gateway: GatewayServer) -> None:
    gateway.new_traces()
    failures: list[Exception] = []

    def talk(agent: str, key: str, number: int) -> None:
        try:
            body = request_of("chat", "text-stream", True, model=f"metaclaw/{agent}")
            body["messages"][0]["content"] += f" {agent} {number}"
            assert b"[DONE]" in ask(gateway.url, key, "chat", body).content
        except (AssertionError, httpx.HTTPError) as error:
            failures.append(error)

    pool = gateway.pool_key
    threads = [
        threading.Thread(target=talk, args=(agent, key, number))
        for number in range(4)
        for agent, key in (("alpha", gateway.key), ("beta", pool), ("gamma", pool))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failures
    traces = gateway.new_traces()
    assert len(traces) == len(threads)
    assert all(f" {trace.agent} " in trace.last_user_text for trace in traces)
    assert len({trace.session for trace in traces}) == len(threads)


@pytest.mark.law(5)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_while_the_store_is_locked_answers_go_out_and_the_loss_is_counted(gateway: GatewayServer, stream: bool) -> None:
    body = request_of("chat", f"text-{'stream' if stream else 'whole'}", stream)
    gateway.new_traces()
    lock = sqlite3.connect(gateway.settings.home / "metaclaw.db", isolation_level=None)
    lock.execute("BEGIN IMMEDIATE")
    try:
        response = ask(gateway.url, gateway.key, "chat", body)
    finally:
        lock.execute("ROLLBACK")
        lock.close()
    assert response.status_code == 200
    assert b"Analysis" in response.content
    assert "x-metaclaw-trace-id" not in response.headers
    internal = (gateway.settings.home / "internal.key").read_text()
    page = httpx.get(f"{gateway.url}/metaclaw/metrics", headers={"authorization": f"Bearer {internal}"}).text
    assert re.search(r'metaclaw_events_total\{agent="alpha",name="requests_unrecorded"\} [1-9]', page)
    assert ask(gateway.url, gateway.key, "chat", body).headers["x-metaclaw-trace-id"] in {
        t.id for t in gateway.traces()
    }


def test_a_stream_under_a_name_that_nobody_listed_is_counted_by_vllm_and_not_by_litellm(
    gateway: GatewayServer, replay: ReplayUpstream
) -> None:
    body = request_of("chat", "text-stream", True, model="openclaw")
    reply = ask(gateway.url, gateway.key, "chat", body).content
    assert replay.requests[-1]["stream_options"] == {"include_usage": True}
    assert b'"usage"' not in reply
    assert b'"model":"openclaw"' in reply
