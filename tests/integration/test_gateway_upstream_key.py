"""The caller's own upstream key reaches the deployment that the caller named, and no other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.gateway_cases import ROUTES, ask, request_of
from tests.gateway_server import GatewayServer, running_gateway
from tests.replay_upstream import ReplayUpstream, Script

pytestmark = pytest.mark.gateway

SECRET = "sk-callers-very-own-0123456789"
SENT = {"x-upstream-key": SECRET}


@pytest.fixture(scope="module")
def broken() -> Iterator[ReplayUpstream]:
    """An upstream that fails every request."""
    failure = Script([b'{"error": {"message": "out of order"}}'], [], status=500)
    with ReplayUpstream({"text-whole": failure}) as upstream:
        yield upstream


@pytest.fixture(scope="module")
def server(
    replay: ReplayUpstream,
    broken: ReplayUpstream,
    free_port: Callable[[], int],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[GatewayServer]:
    def deployment(name: str, model: str, url: str, **more: Any) -> dict[str, Any]:
        return {"model_name": name, "litellm_params": {"model": model, "api_base": url, "api_key": "owner-key"} | more}

    listed = [
        deployment("openai", "openai/gpt-x", f"{replay.url}/v1", use_chat_completions_api=True),
        deployment("vllm", "hosted_vllm/own", f"{replay.url}/v1", use_chat_completions_api=True),
        deployment("native", "openai/gpt-z", f"{replay.url}/v1"),
        deployment("claude", "anthropic/claude-x", replay.url),
        deployment("broken", "openai/gpt-y", f"{broken.url}/v1"),
        deployment("wild-*", "hosted_vllm/*", f"{replay.url}/v1", use_chat_completions_api=True),
    ]
    folder, door = tmp_path_factory.mktemp("keys"), {"upstream_key_header": "x-upstream-key"}
    with running_gateway(folder, replay.url, free_port(), gateway=door, deployments=listed) as running:
        yield running


def key_that(upstream: ReplayUpstream) -> str:
    """The key with which the newest request came."""
    return upstream.headers[-1]["authorization"].removeprefix("Bearer ")


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("model", ["openai", "vllm", "wild-one"])
@pytest.mark.parametrize("route", ROUTES)
def test_it_reaches_the_deployment_that_was_named_on_every_route(
    server: GatewayServer, replay: ReplayUpstream, route: str, model: str, stream: bool
) -> None:
    body = request_of(route, f"text-{'stream' if stream else 'whole'}", stream, model=model)
    response = ask(server.url, server.key, route, body, **SENT)
    assert response.status_code == 200, response.text
    assert key_that(replay) == SECRET
    ask(server.url, server.key, route, body)
    assert key_that(replay) == "owner-key"


@pytest.mark.parametrize(("route", "model"), [("responses", "native"), ("messages", "claude"), ("chat", "claude")])
def test_it_reaches_providers_that_speak_the_route_themselves(
    server: GatewayServer, replay: ReplayUpstream, route: str, model: str
) -> None:
    ask(server.url, server.key, route, request_of(route, "text-whole", False, model=model), **SENT)
    sent = replay.headers[-1]
    assert SECRET in {sent.get("x-api-key"), sent.get("authorization", "").removeprefix("Bearer ")}
    assert "owner-key" not in str(sent)


@pytest.mark.parametrize("route", ROUTES)
def test_a_fallback_and_an_agents_own_model_get_the_owners_key(
    server: GatewayServer, replay: ReplayUpstream, broken: ReplayUpstream, route: str
) -> None:
    body = request_of(route, "text-whole", False, model="broken", fallbacks=["openai"])
    seen = len(broken.requests)
    assert ask(server.url, server.key, route, body, **SENT).status_code == 200
    assert len(broken.requests) > seen
    assert key_that(broken) == SECRET
    assert key_that(replay) == "owner-key"
    ask(server.url, server.key, route, request_of(route, "text-whole", False), **SENT)
    assert SECRET not in replay.headers[-1].values()


def test_nobody_gets_it_by_naming_the_group_in_its_own_metadata(
    server: GatewayServer, replay: ReplayUpstream, broken: ReplayUpstream
) -> None:
    forged = {"model_group": "openai"}
    body = request_of("chat", "text-whole", False, model="broken", fallbacks=["openai"])
    body |= {"metadata": forged, "litellm_metadata": forged}
    assert ask(server.url, server.key, "chat", body, **SENT).status_code == 200
    assert broken.requests
    assert key_that(replay) == "owner-key"
