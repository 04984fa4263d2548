"""Which turn and exchange of its session a request is, main or side, and when a session ends: on both databases."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from metaclaw_hooks.types import Kind
from sqlalchemy.engine import Engine

from metaclaw_plugin.errors import UnknownSessionError
from metaclaw_plugin.gateway import sessions
from metaclaw_plugin.gateway.sessions import RequestEvidence
from metaclaw_plugin.store.sessions import find_session, is_held_out
from metaclaw_plugin.store.traces import load_session
from tests.session_cases import INTERNAL, SETTINGS, UUID, answer, ask, said, user

DATA = Path(__file__).parent.parent / "data"


@pytest.mark.law(6)
def test_law_6_a_tool_loop_is_one_exchange_with_one_pin(store: Engine) -> None:
    result = {"role": "tool", "content": "ok"}
    first = ask(store, user("a"), x_session_id="one")
    answer(store, first, said("calls"), pin=7)
    loop = ask(store, user("a"), said("calls"), result, x_session_id="one")
    assert (loop.exchange, loop.new_exchange, loop.adapter_version) == (first.exchange, False, 7)
    again = ask(store, user("a"), said("calls"), result, said("x"), result, x_session_id="one")
    assert (again.exchange, again.adapter_version) == (first.exchange, 7)
    side = ask(store, user("a"), x_session_id="one", x_turn_type="side")
    assert (side.new_exchange, side.adapter_version) == (False, None)
    after_side = ask(store, user("a"), said("calls"), result, said("x"), result, x_session_id="one")
    assert after_side.adapter_version == 7
    answer(store, after_side, said("b"))
    late = ask(store, user("a"), said("b"), result, x_session_id="one")
    assert late.adapter_version is None, "an answer that asks for no tool leaves no loop open"
    answer(store, late, said("calls"), pin=8)
    new = ask(store, user("a"), said("b"), user("c"), x_session_id="one")
    assert (new.exchange, new.new_exchange, new.adapter_version) == (1, True, None)


def test_human_message_that_is_sent_again_stays_in_its_exchange(store: Engine) -> None:
    first = ask(store, user("a"), x_session_id="one")
    again = ask(store, user("a"), x_session_id="one")
    assert (again.turn, again.exchange, again.new_exchange) == (1, first.exchange, False)


@pytest.mark.parametrize(
    ("messages", "body", "headers", "kind"),
    [
        ([user("hi")], {}, {}, Kind.MAIN),
        ([user("hi")], {}, {"x_turn_type": "side"}, Kind.SIDE),
        ([user("hi")], {}, {"x_turn_type": "nonsense"}, Kind.MAIN),
        (
            [{"role": "system", "content": "Generate a concise session title (3-6 words)"}, user("hi")],
            {},
            {},
            Kind.SIDE,
        ),
        (
            [user("hi")],
            {"system": [{"type": "text", "text": "You are a context summarization assistant."}]},
            {},
            Kind.SIDE,
        ),
        ([user("hi")], {"instructions": "Generate a concise session title"}, {}, Kind.SIDE),
        ([user("Generate a concise session title, you said. Why?")], {}, {}, Kind.MAIN),
        (
            [{"role": "system", "content": "Generate a concise session title"}, user("hi")],
            {"tools": [{"type": "function"}]},
            {},
            Kind.MAIN,
        ),
        ([user("Follow the heartbeat monitor scratch context"), INTERNAL], {"tools": [{}]}, {}, Kind.SIDE),
        ([user("Follow the heartbeat monitor scratch context"), said("ok"), user("hi")], {}, {}, Kind.MAIN),
        (
            [{"role": "system", "content": "Generate a concise session title"}, user("hi")],
            {},
            {"x_turn_type": "main"},
            Kind.MAIN,
        ),
    ],
)
def test_main_and_side(
    store: Engine, messages: list[Any], body: dict[str, Any], headers: dict[str, str], kind: Kind
) -> None:
    assert ask(store, *messages, body=body, **headers).kind is kind


def test_owner_names_side_calls_of_other_clients() -> None:
    from metaclaw_plugin.gateway.conversation import recognise_kind

    assert recognise_kind([user("### Task: suggest tags")], None, False, ["### Task:"]) is Kind.SIDE


def test_side_call_without_evidence_is_alone_in_a_closed_session(store: Engine) -> None:
    main = ask(store, user("a"))
    answer(store, main, said("b"))
    side = ask(store, user("a"), said("b"), user("c"), x_turn_type="side")
    assert side.session != main.session
    with store.connect() as c:
        assert load_session(c, side.session).closed_at is not None
    answer(store, side, said("title"))
    assert ask(store, user("a"), said("b"), user("c")).session == main.session


def test_session_ends_after_the_request_that_says_so(store: Engine) -> None:
    last = ask(store, user("a"), x_session_id="one", x_session_done="true")
    with store.connect() as c:
        assert load_session(c, last.session).closed_at is None
    answer(store, last, said("b"), now=9.0)
    with store.connect() as c:
        assert load_session(c, last.session).closed_at == 9.0
    assert ask(store, user("a"), x_session_id="one").session != last.session
    assert not ask(store, user("a"), x_session_done="false").ends_session


def test_idle_sessions_are_closed_and_closed_ones_not_found_again(store: Engine) -> None:
    old = ask(store, user("a"), now=0.0)
    answer(store, old, said("b"), now=10.0)
    young = ask(store, user("x"), now=80.0)
    with store.begin() as c:
        assert sessions.close_idle_sessions(c, 109.0, SETTINGS) == []
        assert sessions.close_idle_sessions(c, 111.0, SETTINGS) == [old.session]
        assert sessions.close_session(c, young.session, "ended", 120.0)
        assert not sessions.close_session(c, young.session, "ended", 121.0)
        with pytest.raises(UnknownSessionError):
            sessions.close_session(c, "nosuch", "ended", 120.0)
    assert ask(store, user("a"), said("b"), user("c")).session != old.session


def test_answer_that_comes_after_its_session_was_closed_leaves_no_chain(store: Engine) -> None:
    from metaclaw_plugin.store import schema

    turn = ask(store, user("a"))
    with store.begin() as c:
        sessions.close_session(c, turn.session, "idle", 5.0)
    answer(store, turn, said("b"), now=6.0)
    with store.connect() as c:
        assert c.execute(schema.chain.select()).all() == []
        assert load_session(c, turn.session).last_at == 0.0


@pytest.mark.law(4)
def test_law_4_a_session_is_found_by_either_name_among_ones_own(store: Engine) -> None:
    turn = ask(store, user("a"), x_session_id="ann's chat")
    epoch = ask(store, user("a"), x_session_affinity=f"{UUID}:4")
    with store.connect() as c:
        assert find_session(c, ["alpha"], turn.session) == turn.session
        assert find_session(c, ["beta", "alpha"], "ann's chat") == turn.session
        assert find_session(c, ["alpha"], f"{UUID}:4") == epoch.session
        assert find_session(c, ["alpha"], UUID) == epoch.session
        for agents in ([], ["beta"]):
            with pytest.raises(UnknownSessionError):
                find_session(c, agents, turn.session)
            with pytest.raises(UnknownSessionError):
                find_session(c, agents, "ann's chat")


def test_one_session_in_ten_is_held_out() -> None:
    held = sum(is_held_out(f"session-{n}", 10) for n in range(10_000))
    assert 900 < held < 1100
    assert not any(is_held_out(f"session-{n}", 0) for n in range(100))
    assert all(is_held_out(f"session-{n}", 1) for n in range(100))


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"messages": None},
        {"messages": 5},
        {"messages": [None, 7, "x", {}, []]},
        {"input": "hello"},
        {"messages": [{"role": ["x"], "content": {}}]},
        {"messages": [{"role": "user", "content": [None, 3]}]},
        {
            "messages": [{"role": "assistant", "tool_calls": [None, {"function": 3}]}],
            "metadata": "x",
            "prompt_cache_key": 3,
        },
    ],
)
@pytest.mark.law(9)
def test_law_9_nonsense_is_a_session_of_its_own(store: Engine, body: dict[str, Any]) -> None:
    heard = sessions.hear(RequestEvidence({}, body), SETTINGS)
    with store.begin() as c:
        turn = sessions.resolve(c, "alpha", heard, 0.0, SETTINGS)
        sessions.settle(c, turn, [said("ok")], 1.0, None)
    assert turn.turn == 0


def test_captured_openclaw_requests(store: Engine) -> None:
    folder = DATA / "openclaw"
    kinds = {}
    for file in sorted(folder.glob("*.json")):
        request = json.loads(file.read_text(encoding="utf-8"))
        headers = {name.lower(): value for name, value in request["headers"]}
        heard = sessions.hear(RequestEvidence(headers, request["body"]), SETTINGS)
        with store.begin() as c:
            turn = sessions.resolve(c, "alpha", heard, 0.0, SETTINGS)
        kinds[file.stem] = turn.kind
    assert kinds == {
        "aux_session_title": Kind.SIDE,
        "chat_turn1_webchat": Kind.MAIN,
        "chat_turn2_with_tool_history": Kind.MAIN,
        "responses_api": Kind.MAIN,
    }
