"""Which session, which turn, main or side: on both databases."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from metaclaw_hooks.types import Kind
from sqlalchemy.engine import Engine

from metaclaw_plugin.errors import UnknownSessionError
from metaclaw_plugin.gateway import sessions
from metaclaw_plugin.gateway.sessions import RequestEvidence, Turn
from metaclaw_plugin.settings import Settings
from metaclaw_plugin.store.sessions import find_session, is_held_out
from metaclaw_plugin.store.traces import insert_traces, load_session
from tests.store_cases import a_trace

SETTINGS = Settings(sessions={"held_out_one_in": 0, "idle_timeout": 100})  # type: ignore[arg-type]
DATA = Path(__file__).parent.parent / "data"
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
        return sessions.resolve(c, agent, evidence, now, SETTINGS)


def answer(store: Engine, turn: Turn, *answers: dict[str, Any], now: float = 1.0, pin: int | None = None) -> None:
    with store.begin() as c:
        sessions.settle(c, turn, answers, now, pin)


@pytest.mark.parametrize(
    ("body", "headers"),
    [
        ({}, {"x_session_id": "one"}),
        ({}, {"x_litellm_session_id": "one"}),
        ({}, {"x_session_affinity": "one:0"}),
        ({}, {"session_id": "one:0"}),
        ({"prompt_cache_key": "one"}, {}),
        ({"metadata": {"session_id": "one"}}, {}),
        ({"metadata": {"user_id": "user_ab_account__session_0f8fad5b-d9cb-469f-a165-70867728950e"}}, {}),
        ({"metadata": {"user_id": '{"session_id":"0f8fad5b-d9cb-469f-a165-70867728950e"}'}}, {}),
    ],
)
def test_each_kind_of_evidence_names_a_session(store: Engine, body: dict[str, Any], headers: dict[str, str]) -> None:
    first = ask(store, user("hi"), body=body, **headers)
    second = ask(store, user("something else"), body=body, **headers)
    stranger = ask(store, user("hi"))
    assert (first.session, first.turn, first.exchange) == (second.session, 0, 0)
    assert (second.turn, second.exchange) == (1, 1)
    with store.connect() as c:
        name = "0f8fad5b-d9cb-469f-a165-70867728950e" if "user_id" in str(body) else "one"
        assert find_session(c, ["alpha"], name) == first.session
    assert stranger.session != first.session


def test_stronger_evidence_goes_first(store: Engine) -> None:
    named = ask(store, user("hi"), x_session_id="one")
    both = ask(store, user("hi"), x_session_id="one", x_session_affinity="two:0", body={"prompt_cache_key": "three"})
    weaker = ask(store, user("hi"), x_session_affinity="two:0", body={"prompt_cache_key": "three"})
    assert both.session == named.session
    assert weaker.session != named.session


@pytest.mark.parametrize("value", ["", "   ", "x" * 401])
def test_value_that_is_no_id_is_no_evidence(store: Engine, value: str) -> None:
    assert ask(store, user("a"), x_session_id=value).session != ask(store, user("b"), x_session_id=value).session


def test_user_is_never_evidence(store: Engine) -> None:
    one = ask(store, user("a"), body={"user": "ann", "metadata": {"user_id": "ann"}})
    two = ask(store, user("b"), body={"user": "ann", "metadata": {"user_id": "ann"}})
    assert one.session != two.session


@pytest.mark.law(4)
def test_law_4_the_same_evidence_of_two_agents_is_two_sessions(store: Engine) -> None:
    one = ask(store, user("a"), x_session_id="one")
    answer(store, one, said("b"))
    two = ask(store, user("a"), x_session_id="one", agent="beta")
    chained = ask(store, user("a"), said("b"), user("c"), agent="beta")
    assert len({one.session, two.session, chained.session}) == 3


def test_raised_epoch_ends_the_session(store: Engine) -> None:
    first = ask(store, user("a"), x_session_affinity="one:0")
    again = ask(store, user("b"), x_session_affinity="one:0")
    raised = ask(store, user("c"), x_session_affinity="one:1")
    late = ask(store, user("d"), x_session_affinity="one:0")
    assert again.session == first.session
    assert raised.session != first.session
    assert late.session not in {first.session, raised.session}
    with store.connect() as c:
        assert load_session(c, first.session).closed_at is not None
        assert load_session(c, raised.session).closed_at is None


def test_conversation_itself_is_the_last_evidence(store: Engine) -> None:
    first = ask(store, user("a"))
    answer(store, first, said("b"))
    second = ask(store, user("a"), said("b"), user("c"))
    answer(store, second, said("d"))
    third = ask(store, user("a"), said("b"), user("c"), said("d"), user("e"))
    assert {first.session, second.session, third.session} == {first.session}
    assert [t.turn for t in (first, second, third)] == [0, 1, 2]
    assert [t.exchange for t in (first, second, third)] == [0, 1, 2]


def test_never_one_bucket_for_all(store: Engine) -> None:
    assert len({ask(store, user("hi")).session for _ in range(5)}) == 5


def test_conversations_that_began_alike_go_on_apart(store: Engine) -> None:
    turns = [ask(store, user("hi"), now=float(n)) for n in range(3)]
    for n, turn in enumerate(turns):
        answer(store, turn, said("hello"), now=float(n))
    follow = [ask(store, user("hi"), said("hello"), user(f"q{n}")) for n in range(2)]
    for turn in follow:
        answer(store, turn, said("yes"))
    assert [turn.session for turn in follow] == [turn.session for turn in turns[:2]]
    late = ask(store, user("hi"), said("hello"), user("q1"), said("yes"), user("more"))
    assert late.session == follow[1].session


def test_edited_history_stays_in_its_session(store: Engine) -> None:
    first = ask(store, user("a"))
    answer(store, first, said("b"))
    answer(store, ask(store, user("a"), said("b"), user("c")), said("d"))
    edited = ask(store, user("a"), said("b"), user("another question"))
    assert (edited.session, edited.turn, edited.exchange) == (first.session, 2, 2)


def test_any_of_n_choices_goes_on(store: Engine) -> None:
    first = ask(store, user("a"))
    answer(store, first, said("x"), said("y"), said("z"))
    assert ask(store, user("a"), said("y"), user("c")).session == first.session


def test_system_prompt_reasoning_and_call_ids_do_not_matter(store: Engine) -> None:
    call = {"role": "assistant", "content": "<think>hm</think>\n\nWait.", "reasoning_content": "hm", "tool_calls": [
        {"id": "call_1", "type": "function", "function": {"name": "exec", "arguments": '{"b": 1, "a": 2}'}},
    ]}  # fmt: skip
    sent_back = {"role": "assistant", "content": [{"type": "text", "text": "Wait."}], "tool_calls": [
        {"id": "call1", "type": "function", "function": {"name": "exec", "arguments": '{"a":2,"b":1}'}}]}  # fmt: skip
    first = ask(store, {"role": "system", "content": "It is Monday."}, user("a"))
    answer(store, first, call)
    result = {"role": "tool", "tool_call_id": "call1", "content": "ok"}
    second = ask(store, {"role": "system", "content": "It is Tuesday."}, user("a"), sent_back, result)
    assert (second.session, second.exchange, second.new_exchange) == (first.session, 0, False)


def test_same_conversation_through_the_other_dialects(store: Engine) -> None:
    call = {"role": "assistant", "content": "Wait.", "tool_calls": [
        {"id": "call_1", "type": "function", "function": {"name": "exec", "arguments": '{"a": 2}'}}]}  # fmt: skip
    first = ask(store, user("a"), body={"system": "Be terse."})
    answer(store, first, call)
    anthropic = [
        {"role": "user", "content": [{"type": "text", "text": "a"}]},
        {"role": "assistant", "content": [
            {"type": "thinking", "thinking": "hm", "signature": "s"},
            {"type": "text", "text": "Wait."},
            {"type": "tool_use", "id": "toolu_1", "name": "exec", "input": {"a": 2}},
        ]},
        {"role": "user", "content": [
            {"type": "tool_result", "tool_use_id": "toolu_1", "content": [{"type": "text", "text": "ok"}]},
            {"type": "text", "text": "<system-reminder>be good</system-reminder>"},
        ]},
    ]  # fmt: skip
    responses = [
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "a"}]},
        {"type": "reasoning", "summary": []},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Wait."}]},
        {"type": "function_call", "call_id": "c", "name": "exec", "arguments": '{"a":2}'},
        {"type": "function_call_output", "call_id": "c", "output": "ok"},
    ]
    for messages in (anthropic, responses):
        evidence = RequestEvidence({}, {}, messages)
        with store.begin() as c:
            turn = sessions.resolve(c, "alpha", evidence, 2.0, SETTINGS)
        assert (turn.session, turn.exchange, turn.new_exchange) == (first.session, 0, False)


def test_previous_response_id_names_the_session(store: Engine) -> None:
    first = ask(store, user("a"))
    with store.begin() as c:
        insert_traces(c, [a_trace(session=first.session, response_id="resp_1")])
    body = {"previous_response_id": "resp_1"}
    assert ask(store, user("b"), body=body).session == first.session
    assert ask(store, user("b"), body=body, agent="beta").session != first.session


def test_openclaw_is_told_apart_by_its_runtime_line(store: Engine) -> None:
    opening = user("Hi\n\nRuntime: agent=alpha | session=agent:alpha:main | sessionId=16bedc0c-cef4 | host=x")
    first = ask(store, opening, INTERNAL)
    second = ask(store, opening, said("Hello"), user("more"), INTERNAL)
    other = ask(
        store, user("Hi\n\nRuntime: agent=alpha | session=agent:alpha:main | sessionId=77777777-cef4"), INTERNAL
    )
    assert (second.session, second.exchange) == (first.session, 1)
    assert other.session != first.session


def test_openclaw_tail_is_left_out_of_the_chain(store: Engine) -> None:
    first = ask(store, user("a"), INTERNAL)
    call = {"role": "assistant", "content": None, "tool_calls": [
        {"id": "call_1", "type": "function", "function": {"name": "exec", "arguments": "{}"}}]}  # fmt: skip
    answer(store, first, call)
    loop = ask(store, user("a"), call, {"role": "tool", "content": "ok", "tool_call_id": "call1"}, INTERNAL)
    assert (loop.session, loop.exchange, loop.new_exchange) == (first.session, 0, False)
    answer(store, loop, said("done"))
    follow = ask(store, user("a"), call, {"role": "tool", "content": "ok"}, said("done"), user("b"), INTERNAL)
    assert (follow.session, follow.exchange, follow.new_exchange) == (first.session, 1, True)


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
    epoch = ask(store, user("a"), x_session_affinity="uuid:4")
    with store.connect() as c:
        assert find_session(c, ["alpha"], turn.session) == turn.session
        assert find_session(c, ["beta", "alpha"], "ann's chat") == turn.session
        assert find_session(c, ["alpha"], "uuid:4") == epoch.session
        assert find_session(c, ["alpha"], "uuid") == epoch.session
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
    with store.begin() as c:
        turn = sessions.resolve(c, "alpha", RequestEvidence({}, body), 0.0, SETTINGS)
        sessions.settle(c, turn, [said("ok")], 1.0, None)
    assert turn.turn == 0


def test_captured_openclaw_requests(store: Engine) -> None:
    folder = DATA / "openclaw"
    kinds = {}
    for file in sorted(folder.glob("*.json")):
        request = json.loads(file.read_text(encoding="utf-8"))
        headers = {name.lower(): value for name, value in request["headers"]}
        with store.begin() as c:
            turn = sessions.resolve(c, "alpha", RequestEvidence(headers, request["body"]), 0.0, SETTINGS)
        kinds[file.stem] = turn.kind
    assert kinds == {
        "aux_session_title": Kind.SIDE,
        "chat_turn1_webchat": Kind.MAIN,
        "chat_turn2_with_tool_history": Kind.MAIN,
        "responses_api": Kind.MAIN,
    }
