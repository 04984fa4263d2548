"""Skills on a disk, turns to put them into, and a model that writes them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from metaclaw_hooks.types import Kind, Trace

from metaclaw_plugin.settings import Settings
from metaclaw_plugin.skills.skill_file import FILE_NAME, SHARED, Skill, parse_skill, render_skill, write_atomic
from metaclaw_plugin.store.agents import get_record
from metaclaw_plugin.worker.context import WorkerContext
from tests.store_cases import a_trace
from tests.worker_stage import worker_context, worker_settings

Reply = Callable[[httpx.Request], httpx.Response]


def says(edits: Any) -> Reply:
    content = edits if isinstance(edits, str) else json.dumps({"edits": edits})
    body = {"choices": [{"message": {"role": "assistant", "content": content}}]}
    return lambda _: httpx.Response(200, json=body)


class Evolver:
    """The model at the other end: it keeps what it was asked."""

    def __init__(self, reply: Reply) -> None:
        self.reply = reply
        self.asked: list[dict[str, Any]] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        assert request.url == "http://evolver.test/v1/chat/completions"
        assert request.headers["authorization"] == "Bearer k"
        self.asked.append(json.loads(request.content))
        return self.reply(request)

    @property
    def text(self) -> str:
        return "\n".join(message["content"] for body in self.asked for message in body["messages"])


def evolving(home: Path, **evolution: Any) -> Settings:
    values = {"model": "writer", "url": "http://evolver.test/v1", "api_key": "k", "min_failures": 1} | evolution
    return worker_settings(home, mode="skills_only", skills={"starter": False, "evolution": values})


@contextmanager
def stage(home: Path, evolver: Evolver, **evolution: Any) -> Iterator[WorkerContext]:
    with worker_context(evolving(home, **evolution), httpx.MockTransport(evolver)) as ctx:
        yield ctx


def talk(number: int, agent: str = "alpha", session: str = "ses-0", turn: int | None = None, **changes: Any) -> Trace:
    turn = number if turn is None else turn
    values: dict[str, Any] = {
        "id": f"tr-{number}",
        "agent": agent,
        "session": session,
        "turn": turn,
        "exchange": turn,
        "skills": (),
        "messages": ({"role": "user", "content": f"how long is the river number {number} of {agent}"},),
        "response": {"role": "assistant", "content": f"about {number} miles"},
    }
    return a_trace(**(values | changes))


def generation(ctx: WorkerContext, agent: str = "alpha") -> int:
    with ctx.engine.connect() as c:
        return get_record(c, agent).skill_generation


def put(root: Path, owner: str, name: str, description: str = "When asked, answer.", body: str = "Do it.") -> Path:
    path = root / owner / name / FILE_NAME
    write_atomic(path, render_skill(name, description, body))
    return path


@dataclass(frozen=True)
class FakeTurn:
    session: str = "s1"
    kind: Kind = Kind.MAIN
    turn: int = 1
    exchange: int = 0
    new_exchange: bool = True


def skill(name: str, body: str = "Do it.") -> Skill:
    return parse_skill(render_skill(name, "When asked.", body), name, SHARED)
