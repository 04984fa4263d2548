"""Agents by LiteLLM's own virtual keys: a real LiteLLM on a real PostgreSQL, see litellm_db/database_mode.py."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from typer.testing import CliRunner

from metaclaw_plugin.cli.main import app
from metaclaw_plugin.store.agents import set_owner
from metaclaw_plugin.store.engine import open_store
from tests.gateway_server import GatewayServer, running_database_gateway
from tests.litellm_db.database_mode import CannotBuildError, build, running_database
from tests.replay_upstream import ReplayUpstream

pytestmark = [pytest.mark.gateway, pytest.mark.law(4)]


@pytest.fixture(scope="module")
def virtual(
    replay: ReplayUpstream, free_port: Callable[[], int], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[GatewayServer]:
    try:
        build()
    except CannotBuildError as error:
        pytest.skip(str(error))
    cloud = {"model": "openai/gpt-x", "api_base": f"{replay.url}/v1", "api_key": "owner-key"}
    more: dict[str, Any] = {
        "skills": {"max_skills": 0},
        "deployments": [{"model_name": "cloud", "litellm_params": cloud}],
    }
    folder = tmp_path_factory.mktemp("virtual")
    with running_database() as env, running_database_gateway(folder, replay.url, free_port(), env, **more) as gateway:
        yield gateway


def new_key(gateway: GatewayServer, **body: Any) -> str:
    """A virtual key, as an admin of LiteLLM makes it."""
    reply = call(gateway, "POST", "/key/generate", gateway.key, json=body)
    assert reply.status_code == 200, reply.text
    return str(reply.json()["key"])


def call(gateway: GatewayServer, method: str, path: str, key: str, **more: Any) -> httpx.Response:
    headers = {"authorization": f"Bearer {key}"} | more.pop("headers", {})
    return httpx.request(method, gateway.url + path, headers=headers, timeout=60, verify=False, **more)


def chat(gateway: GatewayServer, key: str, model: str = "openclaw", **headers: str) -> httpx.Response:
    body = {"model": model, "messages": [{"role": "user", "content": "hello case:text-whole"}]}
    return call(gateway, "POST", "/v1/chat/completions", key, json=body, headers=headers)


def agents_of(gateway: GatewayServer, key: str) -> list[str]:
    return [row["agent"] for row in call(gateway, "GET", "/metaclaw/v1/status", key).json()["agents"]]


def test_the_agent_is_the_one_in_the_metadata_else_the_alias(virtual: GatewayServer) -> None:
    by_alias = new_key(virtual, key_alias="ann-notes", user_id="ann")
    by_metadata = new_key(virtual, key_alias="whatever", user_id="ann", metadata={"agent_id": "ann-code"})
    virtual.new_traces()
    for key, agent in ((by_alias, "ann-notes"), (by_metadata, "ann-code")):
        assert chat(virtual, key).headers["x-metaclaw-adapter"] == f"{agent}@v0"
        assert chat(virtual, key, f"metaclaw/{agent}").status_code == 200
        assert agents_of(virtual, key) == [agent]
        assert [m["id"] for m in call(virtual, "GET", "/v1/models", key).json()["data"]] == [
            f"metaclaw/{agent}",
            "cloud",
        ]
    assert [trace.agent for trace in virtual.new_traces()] == ["ann-notes"] * 2 + ["ann-code"] * 2


def test_a_pool_of_agents_is_chosen_from_by_header_and_no_further(virtual: GatewayServer) -> None:
    pool = new_key(virtual, key_alias="pool", user_id="bob", metadata={"agent_id": ["bob-one", "bob-two"]})
    new_key(virtual, key_alias="eve-own", user_id="eve")
    assert agents_of(virtual, pool) == ["bob-one", "bob-two"]
    virtual.new_traces()
    assert chat(virtual, pool, **{"x-agent-id": "bob-two"}).status_code == 200
    assert chat(virtual, pool).status_code == 200
    assert [trace.agent for trace in virtual.new_traces()] == ["bob-two", "bob-one"]
    assert chat(virtual, pool, **{"x-agent-id": "eve-own"}).status_code == 403
    assert chat(virtual, pool, "metaclaw/eve-own").status_code == 403


def test_an_agent_stays_with_the_owner_who_claimed_it_first(virtual: GatewayServer) -> None:
    first = new_key(virtual, key_alias="claimed", user_id="ann")
    second = new_key(virtual, key_alias="of-bob", user_id="bob", metadata={"agent_id": "claimed"})
    assert chat(virtual, first).status_code == 200
    refused = chat(virtual, second)
    assert refused.status_code == 403
    assert "another owner" in refused.json()["error"]["message"]
    assert agents_of(virtual, second) == []
    engine = open_store(virtual.settings.store_url)
    with engine.begin() as c:
        set_owner(c, "claimed", "user:bob")
    engine.dispose()
    assert chat(virtual, second).status_code == 200
    deadline = time.monotonic() + 30
    while chat(virtual, first).status_code == 200:  # what the store said is believed for some seconds
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert chat(virtual, first).status_code == 403


def test_metadata_cannot_pretend_to_be_our_own_authentication(virtual: GatewayServer) -> None:
    claim = {"agents": ["ann-notes"], "internal": True}
    key = new_key(virtual, key_alias="eve-key", user_id="eve", metadata={"metaclaw": claim})
    assert agents_of(virtual, key) == ["eve-key"]
    assert chat(virtual, key, "metaclaw/ann-notes").status_code == 403


def test_a_key_without_an_agent_passes_through_and_is_counted(virtual: GatewayServer) -> None:
    key = new_key(virtual, user_id="zed")
    virtual.new_traces()
    reply = chat(virtual, key, "cloud")
    assert reply.status_code == 200
    assert "x-metaclaw-trace-id" not in reply.headers
    assert virtual.new_traces(wait=0.5) == []
    page = call(virtual, "GET", "/metaclaw/metrics", virtual.key).text
    assert 'metaclaw_events_total{agent="",name="requests_without_agent"}' in page


def test_a_key_that_is_held_to_models_routes_may_rate_and_see_its_own(virtual: GatewayServer) -> None:
    key = new_key(virtual, key_alias="held", user_id="ann", key_type="llm_api")
    trace = chat(virtual, key).headers["x-metaclaw-trace-id"]
    rated = call(virtual, "POST", "/metaclaw/v1/feedback", key, json={"trace_id": trace, "value": 1})
    assert rated.json()["trace_id"] == trace
    assert call(virtual, "GET", f"/metaclaw/v1/traces/{trace}", key).json()["agent"] == "held"
    assert call(virtual, "GET", "/metaclaw/metrics", key).status_code == 403


def test_wrong_and_deleted_keys_are_refused(virtual: GatewayServer) -> None:
    key = new_key(virtual, key_alias="short-lived", user_id="ann")
    assert chat(virtual, key).status_code == 200
    assert call(virtual, "POST", "/key/delete", virtual.key, json={"keys": [key]}).status_code == 200
    assert chat(virtual, key).status_code == 401
    assert chat(virtual, "sk-nobody").status_code == 401
    assert call(virtual, "GET", "/metaclaw/v1/status", "sk-nobody").status_code == 401


def test_openclaw_is_connected_by_a_virtual_key_and_keeps_it(virtual: GatewayServer, tmp_path: Path) -> None:
    config = yaml.safe_load((virtual.log.parent / "config.yaml").read_text())
    config["general_settings"]["database_url"] = "os.environ/DATABASE_URL"
    config["metaclaw"]["gateway"]["admin_key"] = virtual.key
    path, claw = tmp_path / "config.yaml", tmp_path / "openclaw.json"
    path.write_text(yaml.safe_dump(config))
    claw.write_text(json.dumps({"agents": {"list": [{"id": "claw"}]}}))
    options = ["connect", "openclaw", "--file", str(claw), "--context-window", "32768", "--config", str(path)]
    done = CliRunner().invoke(app, options)
    assert done.exit_code == 0, done.output
    key = json.loads(claw.read_text())["models"]["providers"]["metaclaw-claw"]["apiKey"]
    assert chat(virtual, key).headers["x-metaclaw-adapter"] == "claw@v0"
    again = CliRunner().invoke(app, options)
    assert "nothing to change" in again.output
    assert call(virtual, "POST", "/key/delete", virtual.key, json={"keys": [key]}).status_code == 200
    assert CliRunner().invoke(app, options).exit_code == 0
    other = json.loads(claw.read_text())["models"]["providers"]["metaclaw-claw"]["apiKey"]
    assert other != key
    assert chat(virtual, other).headers["x-metaclaw-adapter"] == "claw@v0"
