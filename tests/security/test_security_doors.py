"""Doors beside the front one: WebSockets, mounted applications, and patterns that match the name of an adapter."""

from __future__ import annotations

import base64
import os
import re
import socket
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, HTTPException
from starlette.routing import Mount, WebSocketRoute

from metaclaw_plugin.gateway.proxy_hooks import before_attempt
from tests.gateway_server import GatewayServer, running_gateway
from tests.replay_upstream import ReplayUpstream
from tests.security.house import House
from tests.security.tried import tried

pytestmark = pytest.mark.gateway

PAGES = {"/_next", "/litellm-asset-prefix/_next", "/ui", "/swagger"}  # mounted: files of LiteLLM's pages, for everybody


def shake_hands(url: str, path: str, key: str | None) -> int:
    """Ask for a WebSocket; the status of the answer."""
    head = [f"GET {path} HTTP/1.1", "host: 127.0.0.1", "connection: Upgrade", "upgrade: websocket"]
    head += ["sec-websocket-version: 13", f"sec-websocket-key: {base64.b64encode(os.urandom(16)).decode()}"]
    head += [f"authorization: Bearer {key}"] if key else []
    with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=20) as connection:
        connection.sendall("\r\n".join([*head, "", ""]).encode())
        return int(connection.recv(4096).split(b" ", 2)[1])


def doors(app: FastAPI, kind: type[WebSocketRoute] | type[Mount]) -> list[str]:
    return sorted({re.sub(r"\{[^}]*\}", "x", route.path) for route in app.router.routes if isinstance(route, kind)})


@pytest.mark.parametrize("who", [None, "nobody", "own", "internal", "master"])
def test_no_websocket_is_open_to_any_key(house: House, app: FastAPI, who: str | None) -> None:
    """Not to LiteLLM's admin either: what its frames ask for is neither planned nor captured."""
    key = None if who is None else house.keys.get(who, "mc-never-made")
    paths = doors(app, WebSocketRoute) + [f"{mounted}/x" for mounted in doors(app, Mount)]
    assert {"/v1/responses", "/responses", "/v1/realtime", "/openai/x"} <= set(paths)
    tried("WebSockets", len(paths))
    let_in = [(path, status) for path in paths if (status := shake_hands(house.gateway, path, key)) != 403]
    assert let_in == []


def test_what_is_mounted_is_pages_or_closed(house: House, app: FastAPI) -> None:
    mounted = set(doors(app, Mount))
    assert mounted >= PAGES
    for path in sorted(mounted - PAGES):
        for method, who, status in (("GET", "own", 403), ("POST", "own", 403), ("GET", "nobody", 401)):
            headers = {"authorization": f"Bearer {house.keys.get(who, 'mc-never-made')}", "accept": "application/json"}
            tried("routes of the gateway that are closed to agents")
            answer = httpx.request(method, f"{house.gateway}{path}/x", headers=headers, timeout=30)
            assert answer.status_code == status, (path, answer.text)


@pytest.fixture(scope="module")
def wide(free_port: Callable[[], int], tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayServer]:
    """A gateway whose owner lets any name through to the same vLLM, and opens a WebSocket."""
    with ReplayUpstream() as upstream:
        anything = {"model_name": "*", "litellm_params": {"model": "hosted_vllm/*", "api_base": f"{upstream.url}/v1"}}
        named = {"model": "hosted_vllm/beta@v1", "api_base": f"{upstream.url}/v1", "api_key": "none"}
        deployments = [anything, {"model_name": "betas-first", "litellm_params": named}]
        folder = tmp_path_factory.mktemp("wide")
        opened = {"open_routes": ["/v1/responses"]}
        with running_gateway(folder, upstream.url, free_port(), deployments=deployments, gateway=opened) as server:
            server.upstream = upstream  # type: ignore[attr-defined]
            yield server


SAID = [{"role": "user", "content": "hi case:text-whole"}]
ASKS: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": SAID},
    "/v1/messages": {"messages": SAID, "max_tokens": 9},
    "/v1/responses": {"input": "hi case:text-whole"},
    "/v1/completions": {"prompt": "case:text-whole"},
    "/v1/embeddings": {"input": "case:text-whole"},
}
LIES: dict[str, dict[str, Any]] = {
    "plainly": {},
    "with metadata": {"metadata": {"model_group": "m"}},
    "with LiteLLM's metadata": {"litellm_metadata": {"model_group": "m"}},
}


@pytest.mark.law(4)
@pytest.mark.parametrize("lie", LIES)
@pytest.mark.parametrize("path", ASKS)
def test_law_4_no_pattern_of_the_owners_lets_a_client_choose_an_adapter(
    wide: GatewayServer, path: str, lie: str
) -> None:
    upstream: ReplayUpstream = wide.upstream  # type: ignore[attr-defined]
    before = len(upstream.requests)
    headers = {"authorization": f"Bearer {wide.key}"}
    for model in ("beta@v1", "hosted_vllm/beta@v1", "metaclaw/beta@v1"):
        answer = httpx.post(
            wide.url + path, json={"model": model, **ASKS[path], **LIES[lie]}, headers=headers, timeout=30
        )
        tried("side doors to another agent's adapter")
        assert 400 <= answer.status_code < 500, answer.text
    assert [request.get("model") for request in upstream.requests[before:]] == []


def test_a_deployment_that_the_owner_named_leads_where_it_says(wide: GatewayServer) -> None:
    headers = {"authorization": f"Bearer {wide.key}"}
    body = {"model": "betas-first", "messages": SAID}
    answer = httpx.post(f"{wide.url}/v1/chat/completions", json=body, headers=headers, timeout=30)
    assert answer.status_code == 200, answer.text


def test_a_websocket_opens_where_the_owner_says_so_and_wants_a_key_there(wide: GatewayServer) -> None:
    assert shake_hands(wide.url, "/v1/responses", wide.key) == 101
    assert shake_hands(wide.url, "/v1/responses", "mc-never-made") == 403
    assert shake_hands(wide.url, "/v1/responses", None) == 403
    assert shake_hands(wide.url, "/responses", wide.key) == 403


@pytest.mark.law(4)
@pytest.mark.parametrize(
    "call",
    [
        {"model": "beta@v1", "custom_llm_provider": "hosted_vllm"},
        {"model": "hosted_vllm/beta@v1", "metadata": {}},
        {"model": "hosted_vllm/m", "metadata": {"a": 1}, "litellm_metadata": {"model_group": "metaclaw/beta@v1"}},
        {"model": "hosted_vllm/m", "metadata": {"model_group": "metaclaw/alpha"}},
    ],
)
def test_law_4_no_call_without_a_plan_reaches_an_adapter(call: dict[str, Any]) -> None:
    with pytest.raises(HTTPException) as refused:
        before_attempt(call, "aresponses")
    assert refused.value.status_code == 403
