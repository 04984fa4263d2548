"""The hash of a conversation: what it sees and what it does not; nothing that a client sends makes it fail."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from metaclaw_hooks.types import Kind

from metaclaw_plugin.gateway.conversation import (
    EMPTY,
    extend_hash,
    read_conversation,
    recognise_kind,
    runtime_session,
    text_of,
)

SCALAR = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
KEYS = st.sampled_from(
    ["role", "content", "type", "text", "tool_calls", "function", "name", "arguments", "input", "output"]
)
WORDS = st.sampled_from(["user", "assistant", "tool", "system", "function_call", "function_call_output", "tool_use"])
JSON = st.recursive(
    SCALAR | WORDS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS | st.text(max_size=4), inner, max_size=5),
    max_leaves=20,
)
TEXT = st.text(st.characters(codec="utf-8"), min_size=1, max_size=12).map(lambda text: "x" + text.strip())
TURNS = st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=6)


@given(st.lists(JSON, max_size=6), JSON)
def test_anything_at_all_is_read(messages: list[Any], system: Any) -> None:
    conversation = read_conversation(messages)
    assert len(conversation.hashes) == len(conversation.steps)
    assert len(conversation.hash) == len(conversation.anchor) == 64
    assert isinstance(recognise_kind(messages, system, False, ["x"]), Kind)
    assert runtime_session(messages) is None or isinstance(runtime_session(messages), str)
    assert len(extend_hash(conversation.hash, {"role": "assistant", "content": system})) == 64


@given(TURNS)
def test_each_answer_is_a_pause_of_every_later_request(turns: list[tuple[str, str]]) -> None:
    messages: list[dict[str, Any]] = []
    paused = []
    for question, answer in turns:
        messages.append({"role": "user", "content": question})
        before = read_conversation(messages)
        assert set(paused) <= set(before.pauses(64))
        reply = {"role": "assistant", "content": answer}
        paused.append(extend_hash(before.hash, reply))
        messages.append(reply)
        assert read_conversation(messages).hash == paused[-1]
    assert len(set(paused)) == len(paused)


@given(TEXT, TEXT)
def test_other_words_are_another_conversation(one: str, other: str) -> None:
    hashes = [read_conversation([{"role": "user", "content": text}]).hash for text in (one, other)]
    assert (hashes[0] == hashes[1]) == (one.strip() == other.strip())


def test_steps_cannot_be_shifted_between_messages() -> None:
    two = read_conversation([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
    one = read_conversation([{"role": "user", "content": "a\0assistant\0b"}])
    swapped = read_conversation([{"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}])
    assert len({two.hash, one.hash, swapped.hash}) == 3


def test_images_count_and_empty_messages_do_not() -> None:
    def image(url: str) -> dict[str, Any]:
        part = {"type": "image_url", "image_url": {"url": url}}
        return {"role": "user", "content": [{"type": "text", "text": "look"}, part]}

    plain = {"role": "user", "content": "look"}
    hashes = {read_conversation([message]).hash for message in (image("a"), image("b"), plain)}
    assert len(hashes) == 3
    assert read_conversation([{"role": "user", "content": ""}, {"role": "assistant", "content": None}]).hash == EMPTY


def test_pauses_are_the_newest_and_longest_first() -> None:
    messages = [{"role": ("user", "assistant")[n % 2], "content": str(n)} for n in range(200)]
    conversation = read_conversation(messages)
    pauses = conversation.pauses(64)
    assert pauses == list(reversed(conversation.hashes[-64:]))


def test_tool_loop_is_known_by_its_last_message() -> None:
    result = {"role": "tool", "content": "ok"}
    asked = [{"role": "user", "content": "a"}, {"role": "assistant", "content": None, "tool_calls": []}]
    assert read_conversation([*asked, result]).in_tool_loop
    assert not read_conversation([*asked, result, {"role": "user", "content": "stop"}]).in_tool_loop
    assert not read_conversation([]).in_tool_loop


def test_text_of_parts() -> None:
    assert text_of([{"text": "a"}, {"text": 3}, "x", None, {"text": "b"}]) == "a\nb"
    assert text_of(None) == text_of(7) == text_of({}) == ""
