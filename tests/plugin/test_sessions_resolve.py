"""Which session a request belongs to: on both databases."""

from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy.engine import Engine

from metaclaw_plugin.gateway import sessions
from metaclaw_plugin.gateway.sessions import RequestEvidence
from metaclaw_plugin.store.sessions import find_session
from metaclaw_plugin.store.traces import insert_traces, load_session
from tests.session_cases import INTERNAL, SETTINGS, UUID, answer, ask, said, user
from tests.store_cases import a_trace


@pytest.mark.parametrize(
    ("body", "headers"),
    [
        ({}, {"x_session_id": "one"}),
        ({}, {"x_litellm_session_id": "one"}),
        ({}, {"x_session_affinity": "one"}),
        ({}, {"x_session_affinity": f"{UUID}:3"}),
        ({}, {"session_id": "one"}),
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
        name = UUID if UUID in f"{body}{headers}" else "one"
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
    first = ask(store, user("a"), x_session_affinity=f"{UUID}:0")
    again = ask(store, user("b"), x_session_affinity=f"{UUID}:0")
    raised = ask(store, user("c"), x_session_affinity=f"{UUID}:1")
    late = ask(store, user("d"), x_session_affinity=f"{UUID}:0")
    assert again.session == first.session
    assert raised.session != first.session
    assert late.session not in {first.session, raised.session}
    with store.connect() as c:
        assert load_session(c, first.session).closed_at is not None
        assert load_session(c, raised.session).closed_at is None


@pytest.mark.parametrize("by", ["x_session_affinity", "session_id", "prompt_cache_key"])
def test_a_number_at_the_end_of_another_clients_id_is_no_epoch(store: Engine, by: str) -> None:
    def ask_in(chat: str) -> str:
        if by == "prompt_cache_key":
            return ask(store, user("a"), body={by: chat}).session
        return ask(store, user("a"), **{by: chat}).session

    first, second = ask_in("telegram:12345"), ask_in("telegram:12346")
    assert first != second
    assert ask_in("telegram:12345") == first, "it is still open"
    with store.connect() as c:
        assert find_session(c, ["alpha"], "telegram:12345") == first
        assert find_session(c, ["alpha"], "telegram:12346") == second


@pytest.mark.parametrize("by", ["session_id", "prompt_cache_key"])
def test_an_epoch_is_read_where_openclaw_alone_writes_it(store: Engine, by: str) -> None:
    def ask_in(value: str) -> str:
        if by == "prompt_cache_key":
            return ask(store, user("a"), body={by: value}).session
        return ask(store, user("a"), **{by: value}).session

    first, second = ask_in(f"{UUID}:17"), ask_in(f"{UUID}:18")
    assert first != second
    assert ask_in(f"{UUID}:17") == first


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
        heard = sessions.hear(RequestEvidence({}, {}, messages), SETTINGS)
        with store.begin() as c:
            turn = sessions.resolve(c, "alpha", heard, 2.0, SETTINGS)
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
