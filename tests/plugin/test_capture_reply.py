"""A reply is put together exactly, whatever its shape."""

from __future__ import annotations

import pytest

from metaclaw_plugin.capture.reply import Reply, finished_message


def event(delta: dict[str, object], index: int = 0, **more: object) -> dict[str, object]:
    return {"id": "c1", "model": "m", "choices": [{"index": index, "delta": delta, **more}]}


def test_text_reasoning_and_tool_calls_grow_as_they_come() -> None:
    reply = Reply()
    reply.add_event(event({"role": "assistant", "content": ""}))
    reply.add_event(event({"reasoning": "Hm"}))
    reply.add_event(event({"reasoning": "m."}))
    reply.add_event(event({"content": "Let me "}))
    reply.add_event(event({"content": "look."}))
    call = {"index": 0, "id": "call_1", "type": "function", "function": {"name": "look", "arguments": ""}}
    reply.add_event(event({"tool_calls": [call]}))
    reply.add_event(event({"tool_calls": [{"index": 0, "function": {"arguments": '{"at'}}]}))
    reply.add_event(event({"tool_calls": [{"index": 0, "function": {"arguments": '":1}'}}]}))
    second = {"index": 1, "id": "call_2", "type": "function", "function": {"name": "stop", "arguments": "{}"}}
    reply.add_event(event({"tool_calls": [second]}, finish_reason="tool_calls"))
    choice = reply.choices[0]
    assert choice.finish_reason == "tool_calls"
    assert finished_message(choice) == {
        "role": "assistant",
        "content": "Let me look.",
        "reasoning": "Hmm.",
        "tool_calls": [
            {"id": "call_1", "type": "function", "function": {"name": "look", "arguments": '{"at":1}'}},
            {"id": "call_2", "type": "function", "function": {"name": "stop", "arguments": "{}"}},
        ],
    }


def test_choices_that_come_interleaved_are_kept_apart() -> None:
    reply = Reply()
    for index, text, ids in ((0, "a", [1]), (1, "x", [7]), (1, "y", [8, 9]), (0, "b", [2])):
        reply.add_event(event({"content": text}, index, token_ids=ids))
    assert [(reply.choices[i].message["content"], reply.choices[i].token_ids) for i in (0, 1)] == [
        ("ab", [1, 2]),
        ("xy", [7, 8, 9]),
    ]


@pytest.mark.law(2)
def test_what_the_upstream_did_not_send_stays_missing() -> None:
    reply = Reply()
    reply.add_event(event({"content": "hello"}, token_ids=None, logprobs=None, finish_reason="stop"))
    assert reply.prompt_token_ids is None
    assert reply.choices[0].token_ids is None
    assert reply.choices[0].logprobs is None


@pytest.mark.law(2)
@pytest.mark.parametrize("ids", [[1, -2], [1.5], ["1"], [True], 7, [2**32]])
def test_token_ids_that_are_none_make_the_reply_garbled(ids: object) -> None:
    reply = Reply()
    reply.add_event(event({"content": "a"}, token_ids=ids))
    assert reply.garbled


@pytest.mark.parametrize("entries", [[{"token": "a"}], [{"logprob": "x"}], [3]])
def test_logprobs_that_are_none_make_the_reply_garbled(entries: object) -> None:
    reply = Reply()
    reply.add_event(event({"content": "a"}, token_ids=[1], logprobs={"content": entries}))
    assert reply.garbled
    assert reply.choices[0].logprobs is None


def test_a_whole_body_keeps_its_message_without_the_empty_fields() -> None:
    reply = Reply()
    message = {"role": "assistant", "content": None, "refusal": "no", "tool_calls": [], "audio": None}
    reply.add_body({"id": "c", "choices": [{"index": 0, "message": message, "finish_reason": "stop"}]})
    assert reply.choices[0].message == {"role": "assistant", "content": None, "refusal": "no"}
