"""Every route of the running gateway, those of LiteLLM too, with every kind of key."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from litellm.proxy._lazy_features import LAZY_FEATURES

from metaclaw_plugin.gateway.reach import is_open
from tests.security.house import LONG, House, serve_version
from tests.security.public_routes import PUBLIC
from tests.security.tried import tried

pytestmark = pytest.mark.gateway

SAMPLE = 1 if LONG else 8  # of so many routes one, with the keys that are not tried on all in every run


@pytest.fixture(scope="module")
def client(house: House) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=house.gateway, timeout=30, verify=False) as found:
        yield found


def bearer(house: House, who: str | None) -> dict[str, str]:
    if who is None:
        return {}
    return {"authorization": f"Bearer {house.keys.get(who, 'mc-' + 'never-made' * 4)}"}


@pytest.fixture(scope="module")
def routes(house: House, client: httpx.Client) -> list[tuple[str, str]]:
    """Method and path of each route; in a long run those too that LiteLLM loads only when it is first asked for."""
    master = bearer(house, "master")
    wanted = {feature.name for feature in LAZY_FEATURES} if LONG else {"llm_passthrough", "anthropic_passthrough"}
    for name in sorted(wanted):
        client.post(f"/lazy/warm/{name}", headers=master)
    client.get("/mcp/enabled", headers=master)  # an application of its own, which comes with the first request to it
    listed = client.get("/routes", headers=master).json()["routes"]
    found = {(method, route["path"]) for route in listed for method in route.get("methods") or ()}
    return sorted((m, p) for m, p in found if m not in ("HEAD", "OPTIONS"))


def filled(path: str) -> str:
    return re.sub(r"\{[^}]*\}", "x", path)


def ask(client: httpx.Client, house: House, who: str | None, method: str, path: str, **more: Any) -> httpx.Response:
    headers = {**bearer(house, who), **more.pop("headers", {})}
    if method != "GET" and not more:
        more["json"] = {}
    try:
        return client.request(method, path, headers=headers, **more)
    except httpx.ReadError:  # LiteLLM's pass-through to Langfuse breaks the connection after its error
        return client.request(method, path, headers=headers, **more)


@pytest.mark.parametrize(("who", "every"), [(None, 1), ("nobody", SAMPLE), ("revoked", SAMPLE)])
def test_every_route_wants_a_key(
    house: House, client: httpx.Client, routes: list[tuple[str, str]], who: str | None, every: int
) -> None:
    assert len(routes) > (1000 if LONG else 700)
    told, wrong = tuple(house.secrets.values()), []
    for method, path in routes[::every]:
        answer = ask(client, house, who, method, filled(path))
        leaks = any(secret in answer.text for secret in told)
        if leaks or answer.status_code not in PUBLIC.get(f"{method} {path}", (401,)):
            wrong.append((method, path, answer.status_code, "a secret!" if leaks else answer.text[:80]))
    tried("routes of the gateway without a key that works", len(routes[::every]))
    assert not wrong, "\n".join(map(str, wrong))


@pytest.mark.skipif(not LONG, reason="LiteLLM has not loaded all its routes")
def test_what_is_public_is_there(routes: list[tuple[str, str]]) -> None:
    assert set(PUBLIC) <= {f"{method} {path}" for method, path in routes}


@pytest.mark.parametrize(("who", "every"), [("own", 1), ("other", SAMPLE), ("internal", SAMPLE)])
def test_a_key_of_ours_opens_models_and_our_routes_and_no_other(
    house: House, client: httpx.Client, routes: list[tuple[str, str]], who: str, every: int
) -> None:
    wrong = []
    for method, path in routes[::every]:
        if is_open(method, filled(path)):
            continue
        answer = ask(client, house, who, method, filled(path))
        tried("routes of the gateway that are closed to agents")
        if answer.status_code not in PUBLIC.get(f"{method} {path}", (403,)):
            wrong.append((method, path, answer.status_code, answer.text[:80]))
    assert not wrong, "\n".join(map(str, wrong))
    opened = {filled(path) for method, path in routes if is_open(method, filled(path))}
    assert {"/v1/chat/completions", "/v1/messages", "/v1/responses", "/v1/models"} <= opened
    assert not any(path.startswith(("/key", "/config", "/model/", "/vllm", "/user", "/credentials")) for path in opened)


# Ours: the request, and the status for each key. `own` acts for alpha, `other` for beta; all that is named is alpha's.
CHAT = {"model": "metaclaw/alpha", "messages": [{"role": "user", "content": "hi case:fresh"}]}
MESSAGES = CHAT | {"max_tokens": 16}
RESPONSES = {"model": "metaclaw/alpha", "input": "hi case:fresh"}
NAMED = {"headers": {"x-agent-id": "alpha"}, "json": CHAT | {"model": "any"}}
SOME_WAIT = -1  # 200 if feedback of a test before has come to the trainer by now, else 409

OURS: dict[str, tuple[dict[str, Any], dict[str, int]]] = {
    "POST /v1/chat/completions": ({"json": CHAT}, {"own": 200, "other": 403, "internal": 403, "master": 403}),
    "POST /v1/messages": ({"json": MESSAGES}, {"own": 200, "other": 403, "internal": 403, "master": 403}),
    "POST /v1/responses": ({"json": RESPONSES}, {"own": 200, "other": 403, "internal": 403, "master": 403}),
    "POST /chat/completions": (NAMED, {"own": 200, "other": 403, "internal": 400, "master": 403}),
    "GET /v1/models": ({}, {"own": 200, "other": 200, "internal": 200, "master": 200}),
    "GET /metaclaw/metrics": ({}, {"own": 403, "other": 403, "internal": 200, "master": 200}),
    "POST /metaclaw/v1/feedback": (
        {"json": {"trace_id": "TRACE", "value": -1}},
        {"own": 200, "other": 200, "internal": 403, "master": 403},  # 200 to other: kept for a trace of its own to come
    ),
    "POST /metaclaw/v1/sessions/{session}/end": ({}, {"own": 200, "other": 404, "internal": 404, "master": 404}),
    "GET /metaclaw/v1/traces": (
        {"params": {"agent": "alpha"}},
        {"own": 200, "other": 404, "internal": 404, "master": 404},
    ),
    "GET /metaclaw/v1/traces/{trace_id}": ({}, {"own": 200, "other": 404, "internal": 404, "master": 404}),
    "GET /metaclaw/v1/status": ({}, {"own": 200, "other": 200, "internal": 200, "master": 200}),
    "GET /metaclaw/v1/adapters": (
        {"params": {"agent": "alpha"}},
        {"own": 200, "other": 404, "internal": 404, "master": 404},
    ),
    "GET /metaclaw/v1/adapters/{name}": ({}, {"own": 200, "other": 404, "internal": 404, "master": 404}),
    "GET /metaclaw/v1/adapters/{name}/export": ({}, {"own": 503, "other": 404, "internal": 404, "master": 404}),
    "POST /metaclaw/v1/agents/{agent}/train": ({}, {"own": SOME_WAIT, "other": 404, "internal": 404, "master": 404}),
    "POST /metaclaw/v1/adapters/{name}/promote": ({}, {"own": 200, "other": 404, "internal": 404, "master": 404}),
    "POST /metaclaw/v1/adapters/rollback": (
        {"json": {"agent": "alpha"}},
        {"own": 200, "other": 404, "internal": 404, "master": 404},
    ),
    "POST /metaclaw/v1/adapters/retrain": (
        {"json": {"agent": "alpha", "without_deleted": True}},
        {"own": 200, "other": 404, "internal": 404, "master": 404},
    ),
}


@pytest.fixture(scope="module")
def alphas(house: House, client: httpx.Client) -> dict[str, str]:
    """Things of alpha's, by the names that routes have for them."""
    reply = ask(
        client, house, "own", "POST", "/v1/chat/completions", json=CHAT, headers={"x-session-id": "alphas-session"}
    )
    serve_version(house, "alpha")
    trace = reply.headers["x-metaclaw-trace-id"]
    return {"session": "alphas-session", "trace_id": trace, "name": "alpha@v1", "agent": "alpha"}


def test_every_route_of_ours_has_an_expectation(routes: list[tuple[str, str]]) -> None:
    ours = {f"{method} {path}" for method, path in routes if path.startswith("/metaclaw")}
    assert ours == {name for name in OURS if " /metaclaw" in name}


@pytest.mark.law(4)
@pytest.mark.parametrize("who", [None, "nobody", "revoked", "other", "internal", "master", "own"])
@pytest.mark.parametrize("name", OURS)
def test_law_4_a_key_acts_for_its_own_agents_only(
    house: House, client: httpx.Client, alphas: dict[str, str], name: str, who: str | None
) -> None:
    method, path = name.split(" ")
    request, expected = OURS[name]
    request = {**request, "json": {**request["json"]}} if "json" in request else dict(request)
    if "trace_id" in request.get("json", {}):
        request["json"]["trace_id"] = alphas["trace_id"]
    path = re.sub(r"\{(\w+)\}", lambda found: alphas[found[1]], path)
    answer = ask(client, house, who, method, path, **request)
    tried("our routes, each with every kind of key")
    status = expected.get(who or "", 401)
    assert answer.status_code in ((200, 409) if status == SOME_WAIT else (status,)), answer.text
    assert "Traceback" not in answer.text
    if who == "other":
        said = answer.text
        for named in alphas.values():  # what the caller named itself
            said = said.replace(f"'{named}'", "")
        assert "alpha" not in said, "it names what is not the caller's own"
        if name.endswith("/feedback"):
            assert answer.json()["trace_id"] is None


@pytest.mark.law(4)
@pytest.mark.parametrize("name", ["GET /metaclaw/v1/adapters/{}", "POST /metaclaw/v1/agents/{}/train"])
def test_law_4_what_is_anothers_is_answered_like_what_does_not_exist(
    house: House, client: httpx.Client, alphas: dict[str, str], name: str
) -> None:
    method, path = name.split(" ")
    there, nowhere = (alphas["name"], "never@v1") if "adapters" in path else ("alpha", "never")
    found = ask(client, house, "other", method, path.format(there))
    missing = ask(client, house, "other", method, path.format(nowhere))
    assert found.status_code == missing.status_code == 404
    assert found.text.replace(there, "X") == missing.text.replace(nowhere, "X")


BETAS = "metaclaw/beta@v1"
SAID = [{"role": "user", "content": "hi case:text-whole"}]
SIDE_DOORS: dict[str, tuple[str, dict[str, Any]]] = {
    "completions": ("/v1/completions", {"model": BETAS, "prompt": "case:text-whole"}),
    "embeddings": ("/v1/embeddings", {"model": BETAS, "input": "case:text-whole"}),
    "rerank": ("/v1/rerank", {"model": BETAS, "query": "case:text-whole", "documents": ["a"]}),
    "moderations": ("/v1/moderations", {"model": BETAS, "input": "case:text-whole"}),
    "images": ("/v1/images/generations", {"model": BETAS, "prompt": "case:text-whole"}),
    "speech": ("/v1/audio/speech", {"model": BETAS, "input": "case:text-whole", "voice": "a"}),
    "model in the path": (f"/engines/{BETAS}/chat/completions", {"messages": SAID}),
    "model in an Azure path": (f"/openai/deployments/{BETAS}/chat/completions", {"messages": SAID}),
    "model in the query": (f"/v1/chat/completions?model={BETAS}", {"model": "m", "messages": SAID}),
    "Gemini's route": (f"/v1beta/models/{BETAS}:generateContent", {"contents": [{"parts": [{"text": "case:fresh"}]}]}),
    "the queue": ("/queue/chat/completions", {"model": BETAS, "messages": SAID, "priority": 0}),
    "Cursor's route": ("/cursor/chat/completions", {"model": BETAS, "input": "case:text-whole"}),
    "interactions": ("/interactions", {"model": BETAS, "input": "case:text-whole"}),
    "compact": ("/v1/responses/compact", {"model": BETAS, "input": "case:text-whole"}),
    "vLLM passed through": ("/vllm/v1/chat/completions", {"model": BETAS, "messages": SAID}),
    "vLLM's own admin routes": ("/vllm/v1/unload_lora_adapter", {"model": BETAS, "lora_name": "beta@v1"}),
    "a fallback": ("/v1/chat/completions", {"model": "cloud", "messages": SAID, "fallbacks": [BETAS]}),
    "a fallback that is a request": (
        "/v1/chat/completions",
        {"model": "cloud", "messages": [], "fallbacks": [{"model": BETAS, "messages": SAID}]},
    ),
    "a fallback for long contexts": (
        "/v1/messages",
        {"model": "cloud", "max_tokens": 9, "messages": SAID, "context_window_fallbacks": [{"cloud": [BETAS]}]},
    ),
    "a fallback in settings": (
        "/v1/responses",
        {"model": "cloud", "input": "x", "router_settings_override": {"fallbacks": [{"cloud": [BETAS]}]}},
    ),
    "extra_body of the cloud's model": (
        "/v1/chat/completions",
        {"model": "cloud", "messages": SAID, "extra_body": {"model": "beta@v1"}},
    ),
    "two models in one name": ("/v1/chat/completions", {"model": f"cloud,{BETAS}", "messages": SAID}),
}


@pytest.mark.law(4)
@pytest.mark.parametrize("door", SIDE_DOORS)
def test_law_4_no_side_door_leads_to_another_agents_adapter(house: House, client: httpx.Client, door: str) -> None:
    path, body = SIDE_DOORS[door]
    before = len(house.upstream.requests)
    answer = ask(client, house, "own", "POST", path, json=body)
    tried("side doors to another agent's adapter")
    reached = [str(request.get("model")) for request in house.upstream.requests[before:]]
    assert not [model for model in reached if "beta" in model], (reached, answer.text)
    assert answer.status_code < 500, answer.text


CHOSEN_BY_CLIENT = {
    "api_base": "EVIL", "base_url": "EVIL", "api_key": "sk-mine", "user_config": {
        "model_list": [{"model_name": "cloud", "litellm_params": {"model": "openai/x", "api_base": "EVIL"}}]
    }, "fallbacks": [{"model": "cloud", "api_base": "EVIL", "messages": SAID}],
    "extra_body": {"api_base": "EVIL"}, "model_list": [{"model_name": "cloud", "litellm_params": {"api_base": "EVIL"}}],
    "langfuse_host": "EVIL", "custom_llm_provider": "hosted_vllm", "litellm_metadata": {"model_group": "metaclaw/beta"},
    "metadata": {"user_api_key_metadata": {"metaclaw": {"agents": ["beta"]}}, "model_group": "metaclaw/beta"},
    "proxy_server_request": {"headers": {"x-agent-id": "beta"}}, "user_api_key_dict": {"metadata": {}},
    "mock_response": "not what the model said", "mock_testing_fallbacks": True, "vertex_credentials": "/etc/passwd",
    "aws_bedrock_runtime_endpoint": "EVIL", "azure_ad_token": "x", "secret_fields": {"raw_headers": {}},
}  # fmt: skip


@pytest.mark.parametrize("field", CHOSEN_BY_CLIENT)
@pytest.mark.parametrize("model", ["cloud", "metaclaw/alpha"])
def test_no_field_of_the_body_chooses_where_the_owners_key_goes_or_whose_request_it_is(
    house: House, client: httpx.Client, field: str, model: str
) -> None:
    from tests.replay_upstream import ReplayUpstream

    with ReplayUpstream() as evil:
        value = _with_evil(CHOSEN_BY_CLIENT[field], f"{evil.url}/v1")
        body = {"model": model, "messages": SAID, field: value}
        answer = ask(client, house, "own", "POST", "/v1/chat/completions", json=body)
        tried("fields of the body that would choose server, key or agent")
        assert evil.requests == []
    assert answer.status_code < 500, answer.text
    assert not [secret for secret in house.secrets.values() if secret in answer.text]
    if answer.status_code == 200:
        trace = answer.headers["x-metaclaw-trace-id"]
        assert ask(client, house, "own", "GET", f"/metaclaw/v1/traces/{trace}").json()["agent"] == "alpha"


def _with_evil(value: Any, url: str) -> Any:
    if isinstance(value, dict):
        return {name: _with_evil(inner, url) for name, inner in value.items()}
    if isinstance(value, list):
        return [_with_evil(inner, url) for inner in value]
    return url if value == "EVIL" else value
