"""A request is read before the store is asked: its text, however long, keeps nobody else from the store."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.engine import Engine

from metaclaw_plugin.gateway.current import CurrentRequest
from metaclaw_plugin.gateway.identity import CLAIM, KeyFacts
from metaclaw_plugin.gateway.request import Gateway
from metaclaw_plugin.gateway.runtime import create_gateway
from metaclaw_plugin.settings import parse_settings
from metaclaw_plugin.skills.query import BLOCK_OPEN
from metaclaw_plugin.skills.skill_file import SHARED
from metaclaw_plugin.store.agents import add_agent
from metaclaw_plugin.store.engine import open_store
from tests.skill_cases import put

KEY = KeyFacts(ours=True, metadata={CLAIM: {"key": "k", "agents": ["alpha"]}})


class Watch:
    """Which threads are inside a transaction, and what was read there."""

    def __init__(self, engine: Engine) -> None:
        self.inside: set[int] = set()
        self.begun = 0
        self.read: list[bool] = []
        sa.event.listen(engine, "begin", self._begin)
        for name in ("commit", "rollback"):
            sa.event.listen(engine, name, lambda _: self.inside.discard(threading.get_ident()))

    def _begin(self, _: Any) -> None:
        self.begun += 1
        self.inside.add(threading.get_ident())

    def note(self) -> None:
        self.read.append(threading.get_ident() in self.inside)


class Watched(dict[str, Any]):
    """A message that tells when its text is looked at."""

    def __init__(self, watch: Watch, role: str, content: str) -> None:
        super().__init__(role=role, content=content)
        self._watch = watch

    def get(self, key: str, default: Any = None) -> Any:
        if key == "content":
            self._watch.note()
        return super().get(key, default)


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    engine = open_store(f"sqlite:///{tmp_path / 'metaclaw.db'}")
    with engine.begin() as c:
        add_agent(c, "alpha")
    yield engine
    engine.dispose()


@pytest.fixture
def gateway(tmp_path: Path, engine: Engine) -> Iterator[Gateway]:
    put(tmp_path / "skills", SHARED, "greet", "Use when somebody asks for a greeting in Latin.")
    gateway = create_gateway(parse_settings({"home": str(tmp_path), "skills": {"starter": False}}, "test"), engine)
    yield gateway
    assert gateway.close(10)


async def prepared(gateway: Gateway, messages: list[Any]) -> tuple[CurrentRequest, dict[str, Any]]:
    current, data = CurrentRequest("chat", {"x-session-id": "one"}), {"model": "m", "messages": messages}
    await gateway.prepare(current, KEY, data, listed=False)
    gateway.close_request(current)
    return current, data


async def test_no_transaction_is_open_while_text_is_looked_at(gateway: Gateway, engine: Engine) -> None:
    watch = Watch(engine)
    asked = [Watched(watch, "user", "Please write a greeting in Latin")]
    first, data = await prepared(gateway, asked)
    assert BLOCK_OPEN in data["messages"][0]["content"], "the skill is found and injected"
    more = [*asked, Watched(watch, "assistant", "Salve"), Watched(watch, "user", "<system-reminder>" * 2000)]
    second, _ = await prepared(gateway, more)
    assert first.plan is not None
    assert second.plan is not None
    assert first.plan.turn is not None
    assert second.plan.turn is not None
    assert second.plan.turn.session == first.plan.turn.session
    assert watch.begun >= 2
    assert watch.read
    assert not any(watch.read)


async def test_arguments_nested_without_end_are_compared_as_text(gateway: Gateway) -> None:
    nested: list[Any] = []
    for _ in range(2000):
        nested = [nested]
    call = {"type": "function", "function": {"name": "f", "arguments": "[" * 200_000}}
    use = {"type": "tool_use", "name": "f", "input": nested}
    messages = [
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "assistant", "content": [use]},
    ]
    current, _ = await prepared(gateway, messages)
    assert current.plan is not None
    assert current.plan.turn is not None
