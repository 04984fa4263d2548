"""Requests of conversations, for tests of sessions and turns."""

from __future__ import annotations

import time
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Engine

from metaclaw_plugin.gateway import sessions
from metaclaw_plugin.gateway.sessions import RequestEvidence, Turn
from metaclaw_plugin.settings import Settings
from metaclaw_plugin.store import schema

SETTINGS = Settings(sessions={"held_out_one_in": 0, "idle_timeout": 100})  # type: ignore[arg-type]
UUID = "0f8fad5b-d9cb-469f-a165-70867728950e"  # such as OpenClaw gives a session
INTERNAL = {"role": "user", "content": [{"type": "text", "text": "<<<BEGIN_OPENCLAW_INTERNAL_CONTEXT>>>\nnone"}]}


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def said(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def ask(
    store: Engine,
    *messages: dict[str, Any],
    agent: str = "alpha",
    now: float = 0.0,
    body: dict[str, Any] | None = None,
    **headers: str,
) -> Turn:
    named = {name.replace("_", "-"): value for name, value in headers.items() if name != "session_id"}
    if "session_id" in headers:
        named["session_id"] = headers["session_id"]
    evidence = RequestEvidence(named, {"messages": list(messages), **(body or {})})
    with store.begin() as c:
        return sessions.resolve(c, agent, sessions.hear(evidence, SETTINGS), now, SETTINGS)


def answer(store: Engine, turn: Turn, *answers: dict[str, Any], now: float = 1.0, pin: int | None = None) -> None:
    with store.begin() as c:
        sessions.settle(c, turn, answers, now, pin)


def add_session(c: sa.Connection, name: str = "s1", agent: str = "ada") -> None:
    now = time.time()
    c.execute(
        schema.sessions.insert().values(
            id=name,
            agent=agent,
            evidence="x-session-id",
            evidence_key=name,
            started_at=now,
            last_at=now,
            held_out=False,
            without_skills=[],
        )
    )
