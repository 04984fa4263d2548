"""Whatever a client sends as messages, choosing and injecting skills neither fails nor changes what is not its own."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from metaclaw_hooks.types import Agent, Mode
from sqlalchemy.engine import Engine

from metaclaw_plugin.settings import SkillSettings
from metaclaw_plugin.skills.injection import anchor_messages, plan_injection
from metaclaw_plugin.skills.library import Library
from metaclaw_plugin.skills.query import BLOCK_OPEN, awaits_answer, build_query
from metaclaw_plugin.skills.retrieval import Retriever
from metaclaw_plugin.skills.skill_file import SHARED
from metaclaw_plugin.store.engine import open_store
from tests.skill_cases import FakeTurn, put, skill

ODD = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
PART = st.fixed_dictionaries(
    {"type": st.sampled_from(["text", "input_text", "image_url", "tool_result", "x"])}, optional={"text": ODD}
)
MESSAGE = st.fixed_dictionaries(
    {},
    optional={
        "role": st.sampled_from(["user", "system", "developer", "assistant", "tool"]) | ODD,
        "content": st.text(max_size=40) | st.lists(PART | ODD, max_size=3) | ODD,
        "tool_calls": ODD,
    },
)


@pytest.fixture(scope="module")
def retriever(tmp_path_factory: pytest.TempPathFactory) -> Retriever:
    root = tmp_path_factory.mktemp("skills")
    put(root, SHARED, "greet", "Use when a text is asked for.")
    return Retriever(Library(root), SkillSettings())


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    path: Path = tmp_path_factory.mktemp("store") / "metaclaw.db"
    opened = open_store(f"sqlite:///{path}")
    yield opened
    opened.dispose()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(messages=st.lists(MESSAGE, max_size=5))
def test_no_message_is_too_odd(retriever: Retriever, engine: Engine, messages: list[dict[str, Any]]) -> None:
    before = copy.deepcopy(messages)
    build_query(messages)
    awaits_answer(messages)
    retriever.select("alpha", messages)
    with engine.connect() as plain:
        c = plain.execution_options(metaclaw_writes=True)
        with c.begin() as transaction:
            planned = plan_injection(c, Agent("alpha", Mode.RL), FakeTurn(), anchor_messages(messages), [skill("a")])
            transaction.rollback()
    assert messages == before
    untouched = [message for message in planned.messages if BLOCK_OPEN not in str(message)]
    assert all(message in before for message in untouched)
    assert len(planned.messages) - len(untouched) <= 1
    assert len(planned.messages) - len(before) in (0, 1)
