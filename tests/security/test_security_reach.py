"""What an agent's key opens is answered by LiteLLM's routes to models, and by none that passes it on to a maker."""

from __future__ import annotations

import re

import pytest
from fastapi import FastAPI
from starlette.routing import Match

from metaclaw_plugin.gateway.reach import answers_agents, is_open, is_opened
from tests.security.tried import tried

METHODS = ("GET", "POST", "PUT", "DELETE", "PATCH")
PASSED_ON = (  # to OpenAI, by the route `/openai/{endpoint:path}`, with the key in the owner's environment
    "/openai/chat/completions",
    "/openai/v1/chat/completions",
    "/openai/responses",
    "/openai/responses/x",
    "/openai/responses/x/cancel",
    "/openai/responses/x/input_items",
    "/openai/responses/compact",
    "/openai/responses/input_tokens",
    "/openai/deployments/x/moderations",
    "/openai/deployments/x/images/variations",
    "/openai/v1/embeddings",
    "/openai/v1/models",
    "/openai/v1/images/generations",
    "/openai_passthrough/v1/responses",
)


def endpoint_of(app: FastAPI, method: str, path: str) -> object:
    """What answers; ``None``: nothing."""
    scope = {"type": "http", "method": method, "path": path, "headers": [], "root_path": "", "query_string": b""}
    for route in app.router.routes:
        match, child = route.matches(scope)
        if match is Match.FULL:
            return child["endpoint"]
    return None


def candidates(app: FastAPI) -> set[str]:
    """Every path that LiteLLM has a route for, and each with the ends of open ones in place of a path's parameter."""
    paths = [path for route in app.router.routes if isinstance(path := getattr(route, "path", None), str)]
    plain = {re.sub(r"\{[^}]*\}", "x", path) for path in paths}
    ends = {path.lstrip("/") for path in plain if any(is_open(method, path) for method in METHODS)}
    ends |= {path.split("/", 2)[2] for path in PASSED_ON}
    ends |= {f"{start}/{end}" for start in ("v1", "deployments/x") for end in tuple(ends)}
    wide = {re.sub(r"\{[^}:]*\}", "x", path) for path in paths if ":path}" in path}
    for path in wide:
        plain |= {re.sub(r"\{[^}]*\}", lambda _, end=end: end, path) for end in ends}  # type: ignore[misc]
    return plain


def test_every_open_path_is_answered_by_a_route_to_models(app: FastAPI) -> None:
    opened = sorted((method, path) for path in candidates(app) for method in METHODS if is_open(method, path))
    assert len(opened) > 100
    wrong, answered = [], set()
    for method, path in opened:
        endpoint = endpoint_of(app, method, path)
        module = getattr(endpoint, "__module__", "")
        if endpoint is not None and (not answers_agents(endpoint) or "pass" in module):
            wrong.append(f"{method} {path}: {module}")
        elif endpoint is not None:
            answered.add(f"{method} {path}")
    tried("open paths whose answering function was looked at", len(opened))
    assert not wrong, "\n".join(wrong)
    assert {"POST /v1/chat/completions", "GET /openai/v1/responses/x", "POST /engines/x/embeddings"} <= answered


@pytest.mark.parametrize("path", PASSED_ON)
def test_what_litellm_passes_on_is_not_open(app: FastAPI, path: str) -> None:
    passes_on = [method for method in METHODS if not answers_agents(endpoint_of(app, method, path))]
    assert passes_on == list(METHODS)
    assert not any(is_open(method, path) for method in METHODS)
    assert is_opened(path, ["/v1/files", "/openai*"])  # unless the owner says so


@pytest.mark.parametrize("path", ["/openai/deployments/x/chat/completions", "/openai/v1/responses"])
@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "PATCH"])
def test_another_method_of_an_open_path_is_passed_on_and_not_open(app: FastAPI, method: str, path: str) -> None:
    assert not answers_agents(endpoint_of(app, method, path))
    assert not is_open(method, path)
    assert is_open("POST", path)


def test_a_route_of_the_owners_config_that_passes_on_is_not_open_by_a_path_that_is(app: FastAPI) -> None:
    """LiteLLM's documents pass `/v1/rerank` on to Cohere, with the owner's key."""
    from litellm.proxy.pass_through_endpoints.pass_through_endpoints import create_pass_through_route

    made = create_pass_through_route("/v1/rerank", "http://127.0.0.1:9", {"authorization": "Bearer owner"})
    assert is_open("POST", "/v1/rerank")
    assert not answers_agents(made)
    assert not answers_agents(None)
