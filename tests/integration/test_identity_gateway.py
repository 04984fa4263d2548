"""Keys, agents, sessions and our routes through the real gateway, with the official clients."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import anthropic
import httpx
import openai
import pytest

from metaclaw_plugin.gateway.identity import internal_key
from metaclaw_plugin.store.agents import new_key, revoke_key
from metaclaw_plugin.store.engine import open_store
from tests.gateway_server import GatewayServer

pytestmark = pytest.mark.gateway

CASE = "case:text-whole"  # the words that choose the upstream's answer


def openai_client(gateway: GatewayServer, key: str, **headers: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{gateway.url}/v1", api_key=key, max_retries=0, default_headers=headers)


def ask(gateway: GatewayServer, key: str, *texts: str, model: str = "openclaw", **headers: str) -> httpx.Response:
    """A chat of alternating messages."""
    roles = ("user", "assistant")
    messages = [{"role": roles[n % 2], "content": text} for n, text in enumerate(texts)]
    messages[0]["content"] += f" {CASE}"
    return httpx.post(
        f"{gateway.url}/v1/chat/completions",
        json={"model": model, "messages": messages},
        headers={"authorization": f"Bearer {key}", **headers},
        timeout=60,
    )


def own(gateway: GatewayServer, method: str, path: str, key: str, **more: Any) -> httpx.Response:
    headers = {"authorization": f"Bearer {key}"}
    return httpx.request(method, f"{gateway.url}/metaclaw/v1{path}", headers=headers, timeout=60, **more)


@pytest.fixture
def spare_key(gateway: GatewayServer) -> Iterator[tuple[str, str]]:
    """Id and secret of one more key of alpha."""
    engine = open_store(gateway.settings.store_url)
    with engine.begin() as c:
        key = new_key(c, ["alpha"])
    yield key.id, key.secret
    engine.dispose()


def test_models_are_the_callers_own(gateway: GatewayServer) -> None:
    names = [model.id for model in openai_client(gateway, gateway.key).models.list()]
    pool = [model.id for model in openai_client(gateway, gateway.pool_key).models.list()]
    client = anthropic.Anthropic(base_url=gateway.url, api_key=gateway.key)
    assert names == ["metaclaw/alpha"]
    assert pool == ["metaclaw/beta", "metaclaw/gamma"]
    assert [model.id for model in client.models.list()] == names


@pytest.mark.law(9)
def test_law_9_an_unknown_key_is_401_to_either_client(gateway: GatewayServer) -> None:
    with pytest.raises(openai.AuthenticationError) as caught:
        openai_client(gateway, "mc-nobody").chat.completions.create(
            model="m", messages=[{"role": "user", "content": "hi"}]
        )
    assert "unknown or revoked" in caught.value.message
    client = anthropic.Anthropic(base_url=gateway.url, api_key="mc-nobody", max_retries=0)
    with pytest.raises(anthropic.AuthenticationError) as refused:
        client.messages.create(model="m", max_tokens=5, messages=[{"role": "user", "content": "hi"}])
    assert isinstance(refused.value.body, dict)
    assert refused.value.body["error"]["type"] == "authentication_error"
    for path in ("/v1/models", "/metaclaw/v1/status", "/metaclaw/v1/traces"):
        assert httpx.get(gateway.url + path, timeout=60).status_code == 401


def test_revoked_key_is_refused_within_seconds(gateway: GatewayServer, spare_key: tuple[str, str]) -> None:
    key_id, secret = spare_key
    assert own(gateway, "GET", "/status", secret).status_code == 200
    engine = open_store(gateway.settings.store_url)
    with engine.begin() as c:
        revoke_key(c, key_id)
    engine.dispose()
    deadline = time.monotonic() + 30
    while own(gateway, "GET", "/status", secret).status_code == 200:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert own(gateway, "GET", "/status", secret).status_code == 401


@pytest.mark.law(4)
def test_law_4_headers_choose_among_the_keys_agents_alone(gateway: GatewayServer) -> None:
    gateway.new_traces()
    assert ask(gateway, gateway.pool_key, "one", **{"x-agent-id": "gamma"}).status_code == 200
    assert ask(gateway, gateway.pool_key, "two", model="metaclaw/gamma").status_code == 200
    assert ask(gateway, gateway.pool_key, "three").status_code == 200
    assert [trace.agent for trace in gateway.new_traces()] == ["gamma", "gamma", "beta"]
    for headers, model in (({"x-agent-id": "alpha"}, "m"), ({}, "metaclaw/alpha"), ({}, "metaclaw/beta@v1")):
        refused = ask(gateway, gateway.pool_key, "four", model=model, **headers)
        assert refused.status_code == 403
        assert refused.json()["error"]["message"]
    assert gateway.new_traces() == []


def test_conversation_without_any_header_is_one_session(gateway: GatewayServer) -> None:
    gateway.new_traces()
    said = ask(gateway, gateway.key, "remember me").json()["choices"][0]["message"]["content"]
    ask(gateway, gateway.key, "remember me", said, "and now?")
    ask(gateway, gateway.key, "somebody else")
    one, two, other = gateway.new_traces()
    assert (one.session, one.turn, one.exchange) == (two.session, 0, 0)
    assert (two.turn, two.exchange) == (1, 1)
    assert other.session != one.session


@pytest.mark.law(4)
def test_law_4_our_routes_answer_about_the_callers_agents_alone(gateway: GatewayServer) -> None:
    reply = ask(gateway, gateway.key, "rate me", **{"x-session-id": "rated"})
    trace = reply.headers["x-metaclaw-trace-id"]
    assert own(gateway, "GET", f"/traces/{trace}", gateway.key).json()["agent"] == "alpha"
    assert own(gateway, "GET", f"/traces/{trace}", gateway.pool_key).status_code == 404
    rated = own(gateway, "POST", "/feedback", gateway.key, json={"response_id": reply.json()["id"], "value": 1})
    assert rated.status_code == 200
    assert rated.json()["agent"] == "alpha"
    missed = own(gateway, "POST", "/feedback", gateway.pool_key, json={"trace_id": trace, "value": -1})
    assert missed.json()["trace_id"] is None
    assert own(gateway, "POST", "/sessions/rated/end", gateway.pool_key).status_code == 404
    ended = own(gateway, "POST", "/sessions/rated/end", gateway.key).json()
    assert ended["closed"] is True
    assert own(gateway, "GET", "/status", gateway.key).json()["agents"][0]["agent"] == "alpha"
    listed = own(gateway, "GET", "/traces", gateway.key, params={"session": ended["session"]}).json()["data"]
    assert [row["id"] for row in listed] == [trace]


def test_our_own_calls_are_not_captured(gateway: GatewayServer) -> None:
    gateway.new_traces()
    reply = ask(gateway, internal_key(gateway.settings.home), "judge this", model="metaclaw/metaclaw-base")
    assert reply.status_code == 200
    assert "x-metaclaw-trace-id" not in reply.headers
    assert gateway.new_traces(wait=0.5) == []
