"""Adapter versions over HTTP: the caller's own, and nobody else's."""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
import tarfile
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

import httpx
import pytest
import sqlalchemy as sa
from fastapi import FastAPI, Header
from sqlalchemy.engine import Engine

from metaclaw_plugin.gateway.process import GatewayProcess
from metaclaw_plugin.gateway.routes import create_router
from metaclaw_plugin.settings import RlSettings, Settings
from metaclaw_plugin.store import adapters as versions
from metaclaw_plugin.store.agents import add_agent
from metaclaw_plugin.store.deletion import BY_OWNER
from metaclaw_plugin.store.engine import open_store
from metaclaw_plugin.store.schema import adapters, recalls
from tests.publishing_cases import serve

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
async def trainer() -> AsyncIterator[str]:
    """The trainer's route, as api/agents.py has it, with a sample of ada's and none of bob's."""
    answers = {"ada": {"started": True}, "bob": {"started": False, "reason": "no sample of bob is waiting"}}

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        line = (await reader.readline()).decode().split()
        body = json.dumps(answers[line[1].split("/")[3]]).encode()
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\nconnection: close\r\n\r\n" % len(body) + body)
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


@pytest.fixture
async def client(engine: Engine, trainer: str) -> AsyncIterator[httpx.AsyncClient]:
    app = FastAPI()
    settings = Settings(rl=RlSettings(remote_url=trainer))
    app.include_router(create_router(authenticate, lambda: GatewayProcess(settings, engine)))
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


async def test_a_step_is_taken_now_or_the_reason_is_told(client: httpx.AsyncClient) -> None:
    assert (await client.post("/agents/ada/train", headers=ADA)).json() == {"agent": "ada", "started": True}
    answer = await client.post("/agents/bob/train", headers=BOB)
    assert answer.status_code == 409
    assert "no sample of bob is waiting" in answer.json()["error"]["message"]
    assert (await client.post("/agents/bob/train", headers=ADA)).status_code == 404


async def test_a_trainer_that_is_down_is_told_as_such(engine: Engine) -> None:
    app = FastAPI()
    settings = Settings(rl=RlSettings(remote_url="http://127.0.0.1:9"))
    app.include_router(create_router(authenticate, lambda: GatewayProcess(settings, engine)))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://gateway") as client:
        answer = await client.post("/metaclaw/v1/agents/ada/train", headers=ADA)
    assert answer.status_code == 503
    assert "did not answer" in answer.json()["error"]["message"]


async def test_training_begins_again_without_what_was_deleted(client: httpx.AsyncClient, engine: Engine) -> None:
    body = {"agent": "ada", "without_deleted": True}
    said = (await client.post("/adapters/retrain", json=body, headers=ADA)).json()["said"]
    assert "nothing is to be done" in said
    with engine.begin() as c:
        second = (adapters.c.agent == "ada") & (adapters.c.number == 2)
        manifest = c.scalars(sa.select(adapters.c.manifest).where(second)).one()
        c.execute(adapters.update().where(second).values(manifest=manifest | {"trace_ids": ["gone"]}))
        c.execute(recalls.insert().values(trace_id="gone", agent="ada", cause=BY_OWNER, at=1.0))
    said = (await client.post("/adapters/retrain", json=body, headers=ADA)).json()["said"]
    assert said.startswith("v2 learned from deleted traces; training goes on from v1")
    with engine.connect() as c:
        assert versions.get_route(c, "ada").version == 1
    assert (await client.post("/adapters/retrain", json={"agent": "ada"}, headers=ADA)).status_code == 400
    assert (await client.post("/adapters/retrain", json=body, headers=BOB)).status_code == 404


async def test_a_version_is_exported_as_a_folder_in_a_tar_file(
    client: httpx.AsyncClient, engine: Engine, tmp_path: Path
) -> None:
    folder, weights = tmp_path / "made", b"weights of ada@v2"
    folder.mkdir()
    (folder / "adapter_model.safetensors").write_bytes(weights)
    (folder / "adapter_config.json").write_text('{"r": 8}', encoding="utf-8")
    with engine.begin() as c:
        second = (adapters.c.agent == "ada") & (adapters.c.number == 2)
        manifest = c.scalars(sa.select(adapters.c.manifest).where(second)).one()
        manifest |= {"path": str(folder), "sha256": hashlib.sha256(weights).hexdigest()}
        c.execute(adapters.update().where(second).values(manifest=manifest))
    answer = await client.get("/adapters/ada@v2/export", headers=ADA)
    assert answer.headers["content-type"] == "application/x-tar"
    with tarfile.open(fileobj=io.BytesIO(answer.content)) as tar:
        names = {"ada@v2", *(f"ada@v2/{name}" for name in ("adapter_model.safetensors", "adapter_config.json"))}
        assert set(tar.getnames()) == names | {"ada@v2/manifest.json"}
        found = tar.extractfile("ada@v2/adapter_model.safetensors")
        assert found is not None
        assert found.read() == weights
    assert (await client.get("/adapters/ada@v2/export", headers=BOB)).status_code == 404
    (folder / "adapter_model.safetensors").write_bytes(b"something else")
    answer = await client.get("/adapters/ada@v2/export", headers=ADA)
    assert (answer.status_code, "is damaged" in answer.text) == (503, True)
