"""Answers read where they leave for the client, in all dialects."""

from __future__ import annotations

import gzip
import json
from typing import Any

import pytest

from metaclaw_plugin.capture.reply import finished_message
from metaclaw_plugin.capture.visible import VisibleAnswer

SAID = {
    "role": "assistant",
    "content": "I look.",
    "reasoning": "Hm.",
    "tool_calls": [{"id": "t1", "type": "function", "function": {"name": "look", "arguments": '{"at": 1}'}}],
}


def sse(*events: dict[str, Any], done: bool = True) -> bytes:
    body = b"".join(b"data: " + json.dumps(event).encode() + b"\n\n" for event in events)
    return body + (b"data: [DONE]\n\n" if done else b"")


CALL = SAID["tool_calls"][0]
CHAT = [
    {"id": "c", "model": "m", "choices": [{"index": 0, "delta": {"role": "assistant", "reasoning": "Hm."}}]},
    {"id": "c", "choices": [{"index": 0, "delta": {"content": "I look."}}]},
    {"id": "c", "choices": [{"index": 0, "delta": {"tool_calls": [CALL | {"index": 0}]}}]},  # type: ignore[operator]
    {"id": "c", "choices": [{"index": 0, "delta": {}, "finish_reason": "tool_calls"}]},
]
BLOCKS = [
    {"type": "thinking", "thinking": "Hm."},
    {"type": "text", "text": "I look."},
    {"type": "tool_use", "id": "t1", "name": "look", "input": {"at": 1}},
]
MESSAGE = {"id": "c", "content": BLOCKS, "stop_reason": "tool_use"}
ANTHROPIC = [
    {"type": "message_start", "message": {"id": "c", "model": "m", "content": []}},
    {"type": "content_block_start", "index": 0, "content_block": {"type": "thinking", "thinking": ""}},
    {"type": "content_block_delta", "index": 0, "delta": {"type": "thinking_delta", "thinking": "Hm."}},
    {"type": "content_block_start", "index": 1, "content_block": {"type": "text", "text": ""}},
    {"type": "content_block_delta", "index": 1, "delta": {"type": "text_delta", "text": "I "}},
    {"type": "content_block_delta", "index": 1, "delta": {"type": "text_delta", "text": "look."}},
    {"type": "content_block_start", "index": 2, "content_block": BLOCKS[2] | {"input": {}}},
    {"type": "content_block_delta", "index": 2, "delta": {"type": "input_json_delta", "partial_json": '{"at"'}},
    {"type": "content_block_delta", "index": 2, "delta": {"type": "input_json_delta", "partial_json": ": 1}"}},
    {"type": "message_delta", "delta": {"stop_reason": "tool_use"}},
    {"type": "message_stop"},
]
OUTPUT = [
    {"type": "message", "content": [{"type": "output_text", "text": "I look."}]},
    {"type": "function_call", "call_id": "t1", "name": "look", "arguments": '{"at": 1}'},
]
RESPONSE = {"id": "c", "model": "m", "status": "completed", "output": OUTPUT}
CASES: dict[str, tuple[str, bool, bytes]] = {
    "chat-stream": ("chat", True, sse(*CHAT)),
    "chat-whole": (
        "chat",
        False,
        json.dumps({"id": "c", "choices": [{"index": 0, "message": SAID, "finish_reason": "tool_calls"}]}).encode(),
    ),
    "messages-stream": ("messages", True, sse(*ANTHROPIC, done=False)),
    "messages-whole": (
        "messages",
        False,
        json.dumps({"id": "c", "content": BLOCKS, "stop_reason": "tool_use"}).encode(),
    ),
    "responses-stream": ("responses", True, sse({"type": "response.completed", "response": RESPONSE})),
    "responses-whole": ("responses", False, json.dumps(RESPONSE).encode()),
}


def read(dialect: str, streams: bool, body: bytes, piece: int = 10**9) -> VisibleAnswer:
    answer = VisibleAnswer(dialect, streams)
    for start in range(0, len(body), piece):
        answer.feed(body[start : start + piece])
    answer.end()
    return answer


@pytest.mark.parametrize("piece", [1, 7, 10**9])
@pytest.mark.parametrize("case", CASES)
def test_all_dialects_say_the_same(case: str, piece: int) -> None:
    answer = read(*CASES[case], piece)
    choice = answer.reply.choices[0]
    expected = {key: value for key, value in SAID.items() if not ("responses" in case and key == "reasoning")}
    assert finished_message(choice) == expected
    assert (choice.finish_reason, answer.complete, answer.reply.garbled) == ("tool_calls", True, False)
    assert (answer.reply.id, choice.token_ids, choice.logprobs) == ("c", None, None)


@pytest.mark.parametrize("case", [case for case in CASES if case.endswith("stream")])
def test_half_an_answer_is_not_complete(case: str) -> None:
    dialect, streams, body = CASES[case]
    assert not read(dialect, streams, body[: len(body) // 2]).complete


@pytest.mark.parametrize("dialect", ["chat", "messages", "responses"])
@pytest.mark.parametrize("body", [b"<html>", b"[1]", b'"x"', b"\xff"])
def test_what_is_no_answer_is_garbled(dialect: str, body: bytes) -> None:
    assert read(dialect, False, body).reply.garbled


def test_an_answer_of_the_responses_route_that_failed_says_nothing() -> None:
    answer = read("responses", False, json.dumps(RESPONSE | {"status": "failed"}).encode())
    assert not answer.complete
    assert not answer.reply.choices


@pytest.mark.law(5)
@pytest.mark.parametrize("packed", [b"this is no gzip", gzip.compress(b"data: {}")[:-9] + b"\x00" * 40])
def test_an_answer_that_cannot_be_unpacked_is_not_recorded_and_fails_nobody(packed: bytes) -> None:
    seen = VisibleAnswer("chat", streams=True, packed=True)
    seen.feed(packed)
    seen.feed(b"more")
    seen.end()
    assert (seen.reply.failure, seen.complete) == ("error in _feed", False)


def test_an_answer_that_is_packed_is_read_like_any_other() -> None:
    packed = gzip.compress(sse(*CHAT))
    seen = VisibleAnswer("chat", streams=True, packed=True)
    seen.feed(packed[:30])
    seen.feed(packed[30:])
    assert finished_message(seen.reply.choices[0]) == SAID


@pytest.mark.law(5)
@pytest.mark.parametrize(
    ("dialect", "event"),
    [
        ("responses", {"response": {"status": ["completed"]}}),
        ("messages", {"type": "content_block_delta", "delta": {"partial_json": "{"}, "message": 5}),
        ("messages", {"type": ["message_start"], "content_block": [1], "delta": [2]}),
        ("chat", {"choices": [{"index": 0, "delta": {"content": "a"}}, 7, {"delta": [1]}]}),
    ],
)
def test_events_of_any_shape_fail_nobody(dialect: str, event: dict[str, Any]) -> None:
    seen = VisibleAnswer(dialect, streams=True)
    seen.feed(sse(event))
    seen.end()
