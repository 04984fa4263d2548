"""A trainer's port, plugins and a store for tests of publishing."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import sqlalchemy as sa
from metaclaw_hooks.types import Kind, VersionState
from metaclaw_hooks.wire import Refusal, ServedReply, VersionBody
from sqlalchemy.engine import Engine

from metaclaw_plugin.errors import TrainerUnavailableError
from metaclaw_plugin.gateway.routing import InFlight
from metaclaw_plugin.settings import PublishSettings, Settings
from metaclaw_plugin.store import adapters as store
from metaclaw_plugin.store.engine import open_store
from metaclaw_plugin.worker.publishing import Publisher


class Killed(BaseException):
    """kill -9, as seen from inside."""


def version_body(number: int, agent: str = "ada", parent: int = 0, cursor: int | None = None) -> VersionBody:
    """A version as the trainer lists it."""
    return VersionBody(
        agent=agent,
        number=number,
        base_model="m",
        parent=parent,
        trace_ids=[f"t{number}"],
        step=number,
        metrics={},
        sha256="0" * 64,
        libraries={},
        path=f"/versions/{agent}/{number}",
        created_at=float(number),
        cursor=number if cursor is None else cursor,
    )


@dataclass
class Trainer:
    """Answers as the trainer's routes do; ``kill_at`` dies before or after the n-th call."""

    made: list[VersionBody] = field(default_factory=list)
    held: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    history: list[list[str]] = field(default_factory=list)
    heads: list[tuple[str, int]] = field(default_factory=list)
    broken: dict[str, str] = field(default_factory=dict)
    down: bool = False
    kill_at: int | None = None
    calls: int = 0

    def _call(self) -> None:
        if self.down:
            raise TrainerUnavailableError("the trainer does not answer")
        self.calls += 1
        if self.calls == self.kill_at:
            raise Killed

    async def versions(self, after: int, wait: float = 0.0) -> list[VersionBody]:
        self._call()
        deadline = time.monotonic() + wait
        while not (new := [body for body in self.made if body.cursor > after][:2]) and time.monotonic() < deadline:
            await asyncio.sleep(0.01)
        return new

    async def set_served(self, versions: Sequence[str], keep: Sequence[str] = ()) -> ServedReply:
        self._call()
        self.kept = list(keep)
        self.held = [name for name in versions if name not in self.broken]
        self.history.append(list(versions))
        failed = [Refusal(id=name, reason=self.broken[name]) for name in versions if name in self.broken]
        return ServedReply(held=self.held, failed=failed)

    async def set_head(self, agent: str, version: int) -> None:
        self._call()
        self.heads.append((agent, version))

    def make(self, number: int, agent: str = "ada", parent: int | None = None) -> None:
        parent = number - 1 if parent is None else parent
        self.made.append(version_body(number, agent, parent, len(self.made) + 1))


def unasked(request: httpx.Request) -> httpx.Response:
    """A vLLM that publishing leaves alone: the trainer has seen that the version answers."""
    raise AssertionError(f"vLLM was asked {request.url.path}")


@dataclass
class Plugins:
    """Opinions by plugin name, and what was called."""

    opinions: list[tuple[str, Any]] = field(default_factory=list)
    published: list[str] = field(default_factory=list)

    async def call(self, hook: str, /, **kwargs: Any) -> list[tuple[str, Any]]:
        if hook == "adapter_published":
            self.published.append(kwargs["version"].name)
            return []
        return self.opinions

    async def call_first(self, hook: str, /, **kwargs: Any) -> Any:
        return None

    def implementers(self, hook: str, agent: str | None = None) -> list[str]:
        return []

    def scores_lone_reply(self, name: str) -> bool | None:
        return None


@dataclass
class Context:
    settings: Settings
    engine: Engine
    trainer: Trainer
    plugins: Plugins
    http: httpx.AsyncClient


@dataclass(frozen=True)
class Turn:
    session: str = "s1"
    kind: Kind = Kind.MAIN
    new_exchange: bool = True
    adapter_version: int | None = None


def context(folder: Path, engine: Engine | None = None) -> Context:
    """What a publisher is given, with its own empty store in ``folder`` unless ``engine`` is one."""
    settings = Settings(home=folder, publish=PublishSettings(policy="always", retry_interval=0.001))
    return Context(
        settings,
        engine or open_store(f"sqlite:///{folder / 'metaclaw.db'}"),
        Trainer(),
        Plugins(),
        httpx.AsyncClient(transport=httpx.MockTransport(unasked)),
    )


def in_trial(ctx: Context) -> None:
    """From now on accepted versions go on trial."""
    publish = ctx.settings.publish.model_copy(update={"canary_share": 0.3, "canary_rewards": 8})
    ctx.settings = ctx.settings.model_copy(update={"publish": publish})


def version(ctx: Context, number: int, agent: str = "ada") -> store.VersionRecord:
    with ctx.engine.connect() as c:
        return store.get_version(c, agent, number)


def hold(ctx: Context, number: int, agent: str = "ada") -> None:
    """A request that does not end: the version stays loaded as it drains."""
    with ctx.engine.begin() as c:
        InFlight(ctx.engine).begin(c, agent, number)


def states(ctx: Context, agent: str = "ada") -> dict[int, str]:
    with ctx.engine.connect() as c:
        return {r.version.number: str(r.version.state) for r in store.list_versions(c, agent)}


def route(ctx: Context, agent: str = "ada") -> int:
    with ctx.engine.connect() as c:
        return store.get_route(c, agent).version


async def published(ctx: Context, *numbers: int) -> Publisher:
    """A publisher that has put these versions in place one after the other."""
    publisher = Publisher(ctx)
    for number in numbers:
        ctx.trainer.make(number)
        await publisher.round()
    return publisher


def serve(c: sa.Connection, number: int, agent: str = "ada") -> None:
    store.record_candidate(c, version_body(number, agent))
    store.set_state(c, agent, number, VersionState.SERVING)
    store.set_route(c, agent, number)


async def replaced(ctx: Context) -> Publisher:
    """A publisher by which v2 serves, while v1 drains for a request that does not end."""
    publisher = await published(ctx, 1)
    hold(ctx, 1)
    ctx.trainer.make(2)
    await publisher.round()
    return publisher
