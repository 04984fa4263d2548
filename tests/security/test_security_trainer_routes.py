"""Every route of the running trainer with every kind of key; a caller's training runs are its own."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.security.house import House
from tests.security.tried import tried

DATUM = {"model_input_tokens": [5, 6], "target_tokens": [6, 7], "logprobs": [0.0, -1.0], "advantages": [0.0, 1.0]}
SAMPLE = {
    "id": "s-1", "agent": "alpha", "session": "x", "token_ids": [1, 2, 3, 4], "adapter_version": 0,
    "turns": [{"trace_id": "t-1", "start": 2, "logprobs": [-1.0, -1.0], "reward": 1.0}],
}  # fmt: skip

# Method and path -> a request that is right, and what the key of the worker, and that of another caller, get for it.
# RUN is a training run of the worker's.
ROUTES: dict[str, tuple[dict[str, Any], int, int]] = {
    "GET /v1/health": ({}, 200, 200),
    "GET /metrics": ({}, 200, 200),
    "GET /openapi.json": ({}, 200, 200),
    "GET /v1/hooks": ({}, 200, 200),
    "GET /v1/agents": ({}, 200, 200),
    "PUT /v1/agents/{agent}": ({"json": {"allowed": False}}, 200, 200),
    "GET /v1/agents/{agent}": ({}, 200, 200),
    "POST /v1/agents/{agent}/head": ({"json": {"version": 0}}, 200, 200),
    "POST /v1/agents/{agent}/train": ({}, 200, 200),
    "POST /v1/samples": ({"json": {"samples": [SAMPLE]}}, 200, 200),
    "POST /v1/samples/recall": ({"json": {"trace_ids": ["t-1"]}}, 200, 200),
    "POST /v1/samples/rewards": ({"json": {"rewards": [{"trace_id": "t-1", "reward": 0.5}]}}, 200, 200),
    "GET /v1/versions": ({}, 200, 200),
    "GET /v1/adapters/{name}/{file}": ({}, 404, 404),
    "PUT /v1/served": ({"json": {"versions": []}}, 200, 200),
    "POST /v1/lora/create": ({"json": {"rank": 4}}, 200, 200),
    "POST /v1/train/forward_backward": ({"json": {"session_id": "RUN", "datums": [DATUM]}}, 200, 404),
    "POST /v1/train/optim_step": ({"json": {"session_id": "RUN"}}, 200, 404),
    "POST /v1/weights/save": ({"json": {"session_id": "RUN"}}, 200, 404),
    "POST /v1/checkpoint/save": ({"json": {"session_id": "RUN", "name": "kept"}}, 200, 404),
    "POST /v1/checkpoint/load": ({"json": {"session_id": "RUN", "path": "nowhere"}}, 404, 404),
    "POST /v1/sample": ({"json": {"tokens": [5, 6], "session_id": "RUN"}}, 503, 404),  # the upstream draws no tokens
    "POST /v1/chat/completions": (
        {"json": {"messages": [{"role": "user", "content": "case:fresh"}], "session_id": "RUN"}},
        503,
        404,
    ),
    "DELETE /v1/lora/{session_id}": ({}, 200, 404),
}


@pytest.fixture(scope="module")
def client(house: House) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=house.trainer, timeout=60, verify=False) as found:
        yield found


@pytest.fixture(scope="module")
def run(house: House, client: httpx.Client) -> str:
    """A training run of the worker's."""
    made = client.post("/v1/lora/create", json={"rank": 4}, headers=bearer(house, "worker"))
    return str(made.json()["session_id"])


def bearer(house: House, who: str) -> dict[str, str]:
    return {"authorization": f"Bearer {house.trainer_keys.get(who, 'mct-' + 'never-made' * 4)}"}


def test_every_route_of_the_trainer_has_an_expectation(house: House, client: httpx.Client) -> None:
    paths = client.get("/openapi.json", headers=bearer(house, "worker")).json()["paths"]
    found = {f"{method.upper()} {path}" for path, methods in paths.items() for method in methods}
    assert found == set(ROUTES) - {"GET /openapi.json"}


def _ask(house: House, client: httpx.Client, run: str, name: str, headers: dict[str, str]) -> httpx.Response:
    method, path = name.split(" ")
    request = {key: dict(value) for key, value in ROUTES[name][0].items()}
    if request.get("json", {}).get("session_id") == "RUN":
        request["json"]["session_id"] = run
    named = {"agent": "alpha", "name": "alpha@v999999", "file": "adapter_config.json", "session_id": run}
    path = re.sub(r"\{(\w+)\}", lambda found: named[found[1]], path)
    tried("routes of the trainer, each with every kind of key")
    return client.request(method, path, headers=headers, **request)


@pytest.mark.parametrize("name", [name for name in ROUTES if name != "GET /v1/health"])
def test_no_route_of_the_trainer_is_open_without_a_key_that_works(
    house: House, client: httpx.Client, run: str, name: str
) -> None:
    tries = [{}, *(bearer(house, who) for who in ("nobody", "revoked"))]
    tries += [{"x-api-key": house.trainer_keys["worker"]}, {"authorization": f"Basic {house.trainer_keys['worker']}"}]
    tries += [{"authorization": f"Bearer {house.keys['own']}"}, {"authorization": f"Bearer {house.keys['internal']}"}]
    for headers in tries:
        answer = _ask(house, client, run, name, headers)
        assert (answer.status_code, answer.json()["error"]["type"]) == (401, "authentication_error")


@pytest.mark.parametrize("who", ["other", "worker"])
@pytest.mark.parametrize("name", ROUTES)
def test_a_caller_reaches_its_own_training_runs_only(
    house: House, client: httpx.Client, run: str, name: str, who: str
) -> None:
    if who == "worker" and name == "DELETE /v1/lora/{session_id}":
        pytest.skip("the other tests need it")
    answer = _ask(house, client, run, name, bearer(house, who))
    assert answer.status_code == ROUTES[name][1 if who == "worker" else 2], answer.text
    assert "Traceback" not in answer.text
