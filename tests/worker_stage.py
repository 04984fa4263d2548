"""A store, plugins and a trainer's wire for tests of the worker."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import sqlalchemy as sa
from metaclaw_hooks.types import Trace
from sqlalchemy.engine import Engine

from metaclaw_plugin.settings import Settings, parse_settings
from metaclaw_plugin.store import leases, schema
from metaclaw_plugin.store.agents import add_agent
from metaclaw_plugin.store.engine import open_store
from metaclaw_plugin.store.traces import insert_traces
from metaclaw_plugin.trainer_client import TrainerClient
from metaclaw_plugin.worker.context import WorkerContext
from metaclaw_plugin.worker.wiring import load_plugins


def worker_settings(home: Path, **sections: Mapping[str, Any]) -> Settings:
    """Settings with ``home``; no waiting, unless ``sections`` say so."""
    worker = {"merge_wait": 0, "poll_interval": 0.02} | dict(sections.pop("worker", {}))
    return parse_settings({"home": str(home), "worker": worker, **sections}, "test")


def write_hook(home: Path, name: str, text: str) -> Path:
    """A plugin file ``name`` (such as ``alpha/reward``) in the hooks folder of ``home``."""
    path = home / "hooks" / f"{name}.py"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


@contextmanager
def worker_context(
    settings: Settings, transport: httpx.AsyncBaseTransport | None = None, owner: str | None = None
) -> Iterator[WorkerContext]:
    """A context on the store of ``settings``; ``transport`` stands for the network to the trainer."""
    engine = open_store(settings.store_url)
    plugins = load_plugins(settings, engine)
    http = httpx.AsyncClient(transport=transport, trust_env=False)
    trainer = TrainerClient(http, settings.rl.remote_url)
    try:
        yield WorkerContext(settings, engine, plugins, trainer, http, owner or leases.this_worker())
    finally:
        plugins.close()
        engine.dispose()


def fill(engine: Engine, *traces: Trace, closed: bool = False, held_out: tuple[str, ...] = ()) -> None:
    """Store ``traces``, their agents and their sessions."""
    with engine.begin() as c:
        known = set(c.execute(sa.select(schema.agents.c.name)).scalars())
        for agent in sorted({trace.agent for trace in traces} - known):
            add_agent(c, agent)
        known = set(c.execute(sa.select(schema.sessions.c.id)).scalars())
        for trace in traces:
            if trace.session not in known:
                known.add(trace.session)
                add_session(c, trace, closed=closed, held_out=trace.session in held_out)
        insert_traces(c, traces)


def add_session(c: sa.Connection, trace: Trace, *, closed: bool, held_out: bool) -> None:
    """The session of ``trace``."""
    c.execute(
        sa.insert(schema.sessions).values(
            id=trace.session,
            agent=trace.agent,
            evidence="x-session-id",
            evidence_key=trace.session,
            started_at=trace.started_at,
            last_at=trace.finished_at,
            closed_at=trace.finished_at + 1 if closed else None,
            held_out=held_out,
            without_skills=[],
        )
    )


def rows(engine: Engine, *columns: str, agent: str | None = None) -> list[tuple[Any, ...]]:
    """These columns of all traces, in order of ``seq``."""
    t = schema.traces.c
    query = sa.select(*(t[name] for name in columns)).order_by(t.seq)
    with engine.connect() as c:
        return [tuple(row) for row in c.execute(query if agent is None else query.where(t.agent == agent))]


def answer(samples: Callable[[list[dict[str, Any]]], httpx.Response]) -> httpx.MockTransport:
    """A network at whose end ``samples`` answers POST /v1/samples."""

    def handle(request: httpx.Request) -> httpx.Response:
        assert request.url.path == "/v1/samples"
        return samples(json.loads(request.content)["samples"])

    return httpx.MockTransport(handle)


def accepted(bodies: list[dict[str, Any]]) -> httpx.Response:
    """The trainer takes all."""
    return httpx.Response(200, json={"accepted": [b["id"] for b in bodies], "duplicate": [], "refused": []})


def now() -> float:
    return time.time()
