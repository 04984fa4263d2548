"""The outermost layer: what LiteLLM is never shown, and which answers name no trace."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from metaclaw_hooks.types import Agent, Mode

from metaclaw_plugin.capture.transport import Recording
from metaclaw_plugin.gateway.answer import ADAPTER_HEADER, TRACE_HEADER, Answer
from metaclaw_plugin.gateway.current import CurrentRequest, Plan
from metaclaw_plugin.gateway.edge import Edge
from metaclaw_plugin.gateway.request import Gateway
from metaclaw_plugin.gateway.routing import Route
from metaclaw_plugin.gateway.runtime import create_gateway
from metaclaw_plugin.settings import GatewaySettings, Settings
from metaclaw_plugin.store.engine import open_store
from tests.publishing_cases import Turn

Message = dict[str, Any]


@pytest.fixture
def gateway(tmp_path: Path) -> Gateway:
    settings = Settings(home=tmp_path, gateway=GatewaySettings(upstream_key_header="x-upstream-key"))
    return create_gateway(settings, open_store(f"sqlite:///{tmp_path / 'store.db'}"))


async def once() -> Message:
    return {"type": "http.request", "body": b"{}", "more_body": False}


@pytest.mark.parametrize(
    ("method", "path"),
    [("POST", "/v1/chat/completions"), ("POST", "/v1/embeddings"), ("POST", "/key/generate"), ("GET", "/v1/models")],
)
async def test_litellm_never_sees_the_callers_own_upstream_key(gateway: Gateway, method: str, path: str) -> None:
    seen: list[Message] = []

    async def litellm(scope: Message, receive: Any, send: Any) -> None:
        seen.append(scope)

    async def standing(scope: Message) -> Any:
        return "known"

    headers = [(b"authorization", b"Bearer k"), (b"x-upstream-key", b"secret"), (b"X-Upstream-Key", b"secret")]
    scope = {"type": "http", "method": method, "path": path, "headers": headers}
    await Edge(litellm, gateway, standing)(scope, once, once)
    assert [scope["headers"] for scope in seen] == [[(b"authorization", b"Bearer k")]]


@pytest.mark.parametrize(("over_quota", "named"), [(False, True), (True, False)])
async def test_an_answer_of_which_nothing_will_be_kept_names_no_trace(
    gateway: Gateway, over_quota: bool, named: bool
) -> None:
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    current = CurrentRequest("chat", {}, recording=Recording(keep_logprobs=True, keep_token_ids=True, status=200))
    plan = Plan("tr-1", Agent("alpha", Mode.RL), Route("metaclaw/alpha@v2", 2), Turn(), None)
    current.plan = replace(plan, over_quota=over_quota)
    await Answer(current, gateway, send).take({"type": "http.response.start", "status": 200, "headers": []})
    headers = dict(sent[0]["headers"])
    assert (TRACE_HEADER in headers, ADAPTER_HEADER in headers) == (named, True)
