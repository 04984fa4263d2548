"""Adapter versions over HTTP: what `metaclaw adapters` does, for the agents of the caller's key."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Annotated, Any, Literal

import httpx
from fastapi import APIRouter, Query
from fastapi import Path as PathParameter
from fastapi.responses import FileResponse
from metaclaw_hooks.errors import InvalidNameError
from metaclaw_hooks.names import parse_version
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy.engine import Connection
from starlette.background import BackgroundTask

from metaclaw_plugin.errors import MetaclawError, TrainingNotStartedError, UnknownAgentError, UnknownVersionError
from metaclaw_plugin.exporting import export_archive
from metaclaw_plugin.gateway.identity import Identity
from metaclaw_plugin.gateway.process import GatewayProcess
from metaclaw_plugin.store.adapters import VersionRecord, get_version, list_versions
from metaclaw_plugin.store.lineage import retrain_without_deleted
from metaclaw_plugin.store.wishes import promote, rollback
from metaclaw_plugin.trainer_client import TrainerClient

Ask = Callable[[Any, Callable[[Connection, Identity], Any]], Coroutine[Any, Any, Any]]
Name = Annotated[str, PathParameter(max_length=200, description="Such as ada@v3.")]


class AdaptersReply(BaseModel):
    """By agent and ascending number."""

    data: list[dict[str, Any]]


class Rollback(BaseModel):
    """Which version to go back to."""

    model_config = ConfigDict(extra="forbid")

    agent: str = Field(max_length=63, description="One of the caller's agents.")
    to: int | None = Field(
        None, ge=0, lt=10**9, description="Version number, 0: the base model; unset: the one before."
    )


class WishReply(BaseModel):
    """What will happen, in one line."""

    said: str


class Retrain(BaseModel):
    """Whose training begins again."""

    model_config = ConfigDict(extra="forbid")

    agent: str = Field(max_length=63, description="One of the caller's agents.")
    without_deleted: Literal[True] = Field(description="Leave out every version that learned from deleted traces.")


class TrainingStarted(BaseModel):
    """A step was started; the version that it makes is listed, judged and published like any other."""

    agent: str
    started: bool


def add_adapter_routes(
    router: APIRouter, caller: Any, read: Ask, write: Ask, process: Callable[[], GatewayProcess]
) -> None:
    """Add the routes; ``read`` and ``write`` run work on the store for the authenticated caller."""

    @router.get("/adapters", summary="Adapter versions of the caller's agents")
    async def adapters(
        agent: Annotated[str | None, Query(max_length=63, description="One of the caller's; unset: all.")] = None,
        auth: Any = caller,
    ) -> AdaptersReply:
        def work(c: Connection, identity: Identity) -> AdaptersReply:
            names = identity.agents if agent is None else (_own(identity, agent),)
            return AdaptersReply(data=[record.summary() for name in names for record in list_versions(c, name)])

        reply: AdaptersReply = await read(auth, work)
        return reply

    @router.get("/adapters/{name}", summary="One adapter version")
    async def adapter(name: Name, auth: Any = caller) -> dict[str, Any]:
        def work(c: Connection, identity: Identity) -> dict[str, Any]:
            return get_version(c, *_own_version(identity, name)).details()

        reply: dict[str, Any] = await read(auth, work)
        return reply

    @router.get(
        "/adapters/{name}/export",
        summary="A version as a plain PEFT folder, in a tar file",
        response_class=FileResponse,
    )
    async def export(name: Name, auth: Any = caller) -> FileResponse:
        record: VersionRecord = await read(auth, lambda c, identity: get_version(c, *_own_version(identity, name)))
        rl, folder = process().settings.rl, Path(await asyncio.to_thread(tempfile.mkdtemp))
        forget = BackgroundTask(shutil.rmtree, folder, ignore_errors=True)
        try:
            archive = await asyncio.to_thread(export_archive, record.version, folder, rl.remote_url, rl.headers)
        except MetaclawError:
            await forget()
            raise
        return FileResponse(archive, media_type="application/x-tar", filename=archive.name, background=forget)

    @router.post("/agents/{agent}/train", summary="Take a training step now")
    async def train(
        agent: Annotated[str, PathParameter(max_length=63, description="One of the caller's agents.")],
        auth: Any = caller,
    ) -> TrainingStarted:
        await read(auth, lambda _, identity: _own(identity, agent))
        rl = process().settings.rl
        async with httpx.AsyncClient(trust_env=False) as http:
            reply = await TrainerClient(http, rl.remote_url, rl.remote_api_key).train(agent)
        if not reply.started:
            raise TrainingNotStartedError(f"no step of {agent} was started: {reply.reason or 'no reason was given'}")
        return TrainingStarted(agent=agent, started=True)

    _add_wishes(router, caller, write)


def _add_wishes(router: APIRouter, caller: Any, write: Ask) -> None:
    @router.post("/adapters/{name}/promote", summary="Let a version serve")
    async def put_in_place(name: Name, auth: Any = caller) -> WishReply:
        reply: WishReply = await write(
            auth, lambda c, identity: WishReply(said=promote(c, *_own_version(identity, name)))
        )
        return reply

    @router.post("/adapters/rollback", summary="Take back the version that serves")
    async def take_back(body: Rollback, auth: Any = caller) -> WishReply:
        reply: WishReply = await write(
            auth, lambda c, identity: WishReply(said=rollback(c, _own(identity, body.agent), body.to))
        )
        return reply

    @router.post("/adapters/retrain", summary="Train on from the last version that learned from no deleted trace")
    async def retrain(body: Retrain, auth: Any = caller) -> WishReply:
        reply: WishReply = await write(
            auth, lambda c, identity: WishReply(said=retrain_without_deleted(c, _own(identity, body.agent)))
        )
        return reply


def _own(identity: Identity, agent: str) -> str:
    if agent not in identity.agents:
        raise UnknownAgentError(f"no agent {agent[:80]!r} of yours")
    return agent


def _own_version(identity: Identity, name: str) -> tuple[str, int]:
    """Agent and number, if the agent is the caller's; another's version is answered like one that does not exist."""
    try:
        agent, number = parse_version(name)
    except InvalidNameError as error:
        raise UnknownVersionError(str(error)) from error
    if agent not in identity.agents:
        raise UnknownVersionError(f"no adapter version {name[:80]!r} of yours")
    return agent, number
