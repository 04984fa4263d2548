"""Adapter versions over HTTP: the caller's own, and nobody else's."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

import httpx
import pytest
from fastapi import FastAPI, Header
from sqlalchemy.engine import Engine

from metaclaw_plugin.gateway.process import GatewayProcess
from metaclaw_plugin.gateway.routes import create_router
from metaclaw_plugin.settings import Settings
from metaclaw_plugin.store import adapters as versions
from metaclaw_plugin.store.agents import add_agent
from metaclaw_plugin.store.engine import open_store
from tests.plugin.test_routing_pick import serve

ADA = {"authorization": "ada"}
BOB = {"authorization": "bob"}


def authenticate(authorization: Annotated[str, Header()] = "") -> Any:
    names = [name for name in authorization.split(",") if name]
    return SimpleNamespace(authenticated_by_custom_auth=True, metadata={"metaclaw": {"agents": names}} if names else {})


@pytest.fixture
def engine(tmp_path: Path) -> Engine:
    engine = open_store(f"sqlite:///{tmp_path / 'metaclaw.db'}")
    with engine.begin() as c:
        for name in ("ada", "bob"):
            add_agent(c, name)
        serve(c, 1, "ada")
        serve(c, 2, "ada")
        serve(c, 1, "bob")
    return engine


@pytest.fixture
async def client(engine: Engine) -> AsyncIterator[httpx.AsyncClient]:
    app = FastAPI()
    app.include_router(create_router(authenticate, lambda: GatewayProcess(Settings(), engine)))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://gateway/metaclaw/v1") as found:
        yield found


async def test_versions_are_listed_and_shown(client: httpx.AsyncClient) -> None:
    listed = (await client.get("/adapters", headers=ADA)).json()["data"]
    assert [(row["name"], row["state"]) for row in listed] == [("ada@v1", "draining"), ("ada@v2", "serving")]
    shown = (await client.get("/adapters/ada@v2", headers=ADA)).json()
    assert (shown["trace_ids"], shown["path"]) == (["t2"], "/versions/ada/2")


async def test_rollback_and_promote_turn_the_route(client: httpx.AsyncClient, engine: Engine) -> None:
    taken = await client.post("/adapters/rollback", json={"agent": "ada", "to": 1}, headers=ADA)
    assert (taken.status_code, taken.json()) == (200, {"said": "ada@v1 serves now"})
    put = await client.post("/adapters/ada@v2/promote", headers=ADA)
    assert put.json() == {"said": "ada@v2 serves now"}
    with engine.connect() as c:
        assert versions.get_route(c, "ada").version == 2


@pytest.mark.law(4)
async def test_law_4_another_agents_versions_do_not_exist(client: httpx.AsyncClient, engine: Engine) -> None:
    answers = [
        await client.get("/adapters?agent=ada", headers=BOB),
        await client.get("/adapters/ada@v2", headers=BOB),
        await client.post("/adapters/ada@v1/promote", headers=BOB),
        await client.post("/adapters/rollback", json={"agent": "ada"}, headers=BOB),
    ]
    assert [answer.status_code for answer in answers] == [404] * 4
    assert [row["agent"] for row in (await client.get("/adapters", headers=BOB)).json()["data"]] == ["bob"]
    with engine.connect() as c:
        assert versions.get_route(c, "ada").version == 2


@pytest.mark.law(9)
async def test_law_9_a_wish_that_makes_no_sense_gets_a_clear_error(client: httpx.AsyncClient) -> None:
    for path, body, status in (
        ("/adapters/ada@v9/promote", None, 404),
        ("/adapters/..%2F..%2Fetc/promote", None, 404),
        ("/adapters/rollback", {"agent": "ada", "to": 2}, 409),
        ("/adapters/rollback", {"agent": "ada", "to": -1}, 400),
        ("/adapters/rollback", {"agent": "ada", "version": 1}, 400),
    ):
        answer = await client.post(path, json=body, headers=ADA)
        assert answer.status_code == status, path
        if status != 404:
            assert answer.json()["error"]["message"]
