"""Law 7 on a real store: same bytes, same place, in every later request of a session."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from metaclaw_hooks.types import Agent, Kind, Mode
from sqlalchemy.engine import Engine

from metaclaw_plugin.skills.injection import Injection, anchor_messages, is_withheld, plan_injection
from metaclaw_plugin.skills.query import BLOCK_OPEN
from metaclaw_plugin.skills.skill_file import Skill
from metaclaw_plugin.store.engine import open_store
from metaclaw_plugin.store.schema import skill_exposures
from tests.skill_cases import FakeTurn, skill

ALPHA = Agent("alpha", Mode.RL, skill_generation=3)
INTERNAL = {
    "role": "user",
    "content": [
        {"type": "text", "text": "<<<BEGIN_OPENCLAW_INTERNAL_CONTEXT>>>\nx\n<<<END_OPENCLAW_INTERNAL_CONTEXT>>>"}
    ],
}


@pytest.fixture
def store(tmp_path: Path) -> Engine:
    return open_store(f"sqlite:///{tmp_path / 'store.db'}")


def plan(
    store: Engine, turn: FakeTurn, messages: Sequence[Any], *chosen: Skill, agent: Agent = ALPHA, share: float = 0.0
) -> Injection:
    before = copy.deepcopy(messages)
    with store.begin() as c:
        result = plan_injection(c, agent, turn, anchor_messages(messages), chosen, share)
    assert messages == before, "the caller's messages must not change"
    return result


def names(injection: Injection) -> list[str]:
    return [ref.name for ref in injection.skills]


@pytest.mark.law(7)
def test_law_7_a_session_gets_the_same_bytes_at_the_same_places_and_never_before_the_newest_message(
    store: Engine,
) -> None:
    messages: list[dict[str, Any]] = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "one"}]
    first = plan(store, FakeTurn(), messages, skill("a"))
    assert first.messages[0]["content"].startswith("Be kind.\n\n" + BLOCK_OPEN)
    assert first.messages[1:] == messages[1:]
    sent = [first.messages]
    later = {1: [skill("b")], 2: [], 3: [skill("a"), skill("c")]}
    for exchange, chosen in later.items():
        messages += [{"role": "assistant", "content": "yes"}, {"role": "user", "content": f"more {exchange}"}]
        result = plan(store, FakeTurn(exchange=exchange), messages, *chosen)
        for earlier in sent:
            assert result.messages[: len(earlier)] == earlier, "the prompt must extend every one before it"
        sent.append(result.messages)
    assert BLOCK_OPEN in sent[1][3]["content"]
    assert sent[1][3]["content"].startswith("more 1")
    assert sent[2][5] == {"role": "user", "content": "more 2"}
    assert "## c" in sent[3][7]["content"]
    assert "## a" not in sent[3][7]["content"], "what the session has is not injected twice"
    assert names(result) == ["a", "b", "c"]
    assert result.generation == 3


@pytest.mark.law(7)
def test_law_7_an_edit_of_the_file_does_not_change_what_a_session_was_given(store: Engine) -> None:
    messages = [{"role": "user", "content": "one"}]
    first = plan(store, FakeTurn(), messages, skill("a", "Old way."))
    messages += [{"role": "assistant", "content": "x"}, {"role": "user", "content": "two"}]
    second = plan(store, FakeTurn(exchange=1), messages, skill("a", "New way."))
    assert second.messages[0] == first.messages[0]
    assert second.skills == first.skills
    other = plan(store, FakeTurn(session="s2"), messages, skill("a", "New way."))
    assert "New way." in other.messages[0]["content"]


@pytest.mark.law(7)
def test_law_7_a_tool_loop_re_applies_and_never_selects(store: Engine) -> None:
    messages: list[dict[str, Any]] = [{"role": "system", "content": "s"}, {"role": "user", "content": "one"}, INTERNAL]
    first = plan(store, FakeTurn(), messages, skill("a"))
    loop = [
        *messages[:2],
        {"role": "assistant", "content": None, "tool_calls": [{"id": "callx"}]},
        {"role": "tool", "content": "r", "tool_call_id": "callx"},
        INTERNAL,
    ]
    second = plan(store, FakeTurn(new_exchange=False), loop, skill("b"))
    assert second.messages[:2] == first.messages[:2]
    assert second.messages[2:] == loop[2:]
    assert names(second) == ["a"]


def test_a_late_skill_enters_with_the_humans_message_and_not_openclaws_tail(store: Engine) -> None:
    messages: list[dict[str, Any]] = [{"role": "system", "content": "s"}, {"role": "user", "content": "one"}, INTERNAL]
    plan(store, FakeTurn(), messages)
    messages = [*messages[:2], {"role": "assistant", "content": "x"}, {"role": "user", "content": "two"}, INTERNAL]
    result = plan(store, FakeTurn(exchange=1), messages, skill("a"))
    assert result.messages[3]["content"].startswith("two\n\n" + BLOCK_OPEN)
    assert result.messages[-1] == INTERNAL
    assert result.messages[0] == messages[0]


def test_the_same_words_said_twice_are_two_places(store: Engine) -> None:
    messages: list[dict[str, Any]] = [{"role": "user", "content": "go on"}]
    plan(store, FakeTurn(), messages)
    messages += [{"role": "assistant", "content": "x"}, {"role": "user", "content": "go on"}]
    second = plan(store, FakeTurn(exchange=1), messages, skill("a"))
    assert second.messages[0] == messages[0]
    assert BLOCK_OPEN in second.messages[2]["content"]
    messages += [{"role": "assistant", "content": "y"}, {"role": "user", "content": "go on"}]
    third = plan(store, FakeTurn(exchange=2), messages)
    assert third.messages[:3] == second.messages
    assert third.messages[4] == messages[4]


@pytest.mark.parametrize(
    ("system", "expected_head"),
    [
        ({"role": "system", "content": "s"}, {"role": "system", "content": "s\n\n{block}"}),
        ({"role": "developer", "content": "s"}, {"role": "developer", "content": "s\n\n{block}"}),
        (
            {"role": "system", "content": [{"type": "text", "text": "s", "cache_control": {"type": "ephemeral"}}]},
            {
                "role": "system",
                "content": [
                    {"type": "text", "text": "s", "cache_control": {"type": "ephemeral"}},
                    {"type": "text", "text": "{block}"},
                ],
            },
        ),
        ({"role": "system", "content": None, "name": "x"}, {"role": "system", "content": "{block}", "name": "x"}),
        (None, {"role": "system", "content": "{block}"}),
    ],
)
def test_a_system_prompt_may_be_text_parts_empty_or_absent(store: Engine, system: Any, expected_head: Any) -> None:
    user = {
        "role": "user",
        "content": [{"type": "text", "text": "hi"}, {"type": "image_url", "image_url": {"url": "u"}}],
    }
    messages = [user] if system is None else [system, user]
    result = plan(store, FakeTurn(), messages, skill("a"))
    block = result.messages[0]["content"]
    block = block[-1]["text"] if isinstance(block, list) else block[block.index(BLOCK_OPEN) :]
    assert block.startswith(BLOCK_OPEN)

    def fill(value: Any) -> Any:
        if isinstance(value, str):
            return value.replace("{block}", block)
        if isinstance(value, list):
            return [fill(entry) for entry in value]
        return {key: fill(entry) for key, entry in value.items()} if isinstance(value, dict) else value

    assert result.messages == [fill(expected_head), user]


def test_absent_system_and_a_later_block_both_land_where_they_belong(store: Engine) -> None:
    messages: list[dict[str, Any]] = [{"role": "user", "content": "one"}]
    plan(store, FakeTurn(), messages, skill("a"))
    messages += [{"role": "assistant", "content": "x"}, {"role": "user", "content": [{"type": "text", "text": "two"}]}]
    result = plan(store, FakeTurn(exchange=1), messages, skill("b"))
    assert [message["role"] for message in result.messages] == ["system", "user", "assistant", "user"]
    assert "## a" in result.messages[0]["content"]
    assert result.messages[3]["content"][0] == {"type": "text", "text": "two"}
    assert "## b" in result.messages[3]["content"][1]["text"]


@pytest.mark.parametrize(("turn", "agent"), [(FakeTurn(kind=Kind.SIDE), ALPHA), (FakeTurn(), Agent("alpha", Mode.OFF))])
def test_side_turns_and_mode_off_are_left_alone(store: Engine, turn: FakeTurn, agent: Agent) -> None:
    messages = [{"role": "user", "content": "one"}]
    plan(store, FakeTurn(), messages, skill("a"))
    result = plan(store, turn, messages, skill("a"), agent=agent)
    assert result.messages == messages
    assert result.skills == ()


def test_nothing_relevant_nothing_injected(store: Engine) -> None:
    messages = [{"role": "user", "content": "one"}]
    assert plan(store, FakeTurn(), messages).messages == messages


def test_what_a_client_cut_out_of_its_history_is_not_claimed_and_may_enter_again(store: Engine) -> None:
    messages: list[dict[str, Any]] = [{"role": "system", "content": "s"}, {"role": "user", "content": "one"}]
    plan(store, FakeTurn(), messages)
    messages += [{"role": "assistant", "content": "x"}, {"role": "user", "content": "two"}]
    plan(store, FakeTurn(exchange=1), messages, skill("a"))
    compacted = [{"role": "system", "content": "s"}, {"role": "user", "content": "Summary: one, two."}]
    assert plan(store, FakeTurn(exchange=2, new_exchange=False), compacted).skills == ()
    again = plan(store, FakeTurn(exchange=2), compacted, skill("a"))
    assert names(again) == ["a"]
    assert BLOCK_OPEN in again.messages[1]["content"]
    assert again.messages[0] == compacted[0]


@pytest.mark.law(7)
@pytest.mark.parametrize("first_chosen", [[], ["a"]])
def test_law_7_a_request_sent_again_gets_what_the_first_one_got(store: Engine, first_chosen: list[str]) -> None:
    messages: list[dict[str, Any]] = [{"role": "user", "content": "one"}]
    for exchange in range(2):
        first = plan(store, FakeTurn(exchange=exchange), messages, *map(skill, first_chosen))
        again = plan(store, FakeTurn(exchange=exchange), messages, skill("a"), skill("b"))
        assert again == first
        messages += [{"role": "assistant", "content": "x"}, {"role": "user", "content": "two"}]


def test_sessions_are_apart(store: Engine) -> None:
    messages = [{"role": "user", "content": "one"}]
    plan(store, FakeTurn(), messages, skill("a"))
    assert plan(store, FakeTurn(session="s2"), messages).skills == ()


def test_a_withheld_skill_stays_out_all_session_long_and_is_written_down(store: Engine) -> None:
    session = next(f"s{i}" for i in range(100) if is_withheld(f"s{i}", "a", 0.3) and not is_withheld(f"s{i}", "b", 0.3))
    messages: list[dict[str, Any]] = [{"role": "user", "content": "one"}]
    for exchange in range(3):
        result = plan(store, FakeTurn(session, exchange=exchange), messages, skill("a"), skill("b"), share=0.3)
        assert names(result) == ["b"]
        messages += [{"role": "assistant", "content": "x"}, {"role": "user", "content": f"more {exchange}"}]
    with store.connect() as c:
        rows = c.execute(sa.select(skill_exposures).order_by(skill_exposures.c.skill)).all()
    assert [(row.skill, row.withheld, row.exchange) for row in rows] == [("a", True, 0), ("b", False, 0)]


def test_the_withheld_share_is_what_was_asked_for() -> None:
    for share in (0.0, 0.05, 0.5):
        withheld = sum(is_withheld(f"session-{i}", "a", share) for i in range(20_000)) / 20_000
        assert withheld == pytest.approx(share, abs=0.012)


def test_a_system_prompt_that_is_no_prompt_is_left_for_the_upstream_to_refuse(store: Engine) -> None:
    messages = [{"role": "system", "content": 5}, {"role": "user", "content": "one"}]
    result = plan(store, FakeTurn(), messages, skill("a"))
    assert result.messages == messages
    assert result.skills == ()
