"""Thinking apart from the answer, whole and streamed."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from metaclaw_trainer.thinking import DeltaSplitter, ThinkingSplitter, split_message

CASES = [
    ("plain words", "", "plain words"),
    ("<think>first</think>then", "first", "then"),
    ("<think>\nfirst\n</think>\n\nthen\n", "first", "then\n"),
    ("  <think>a < b </thin k></think>c", "a < b </thin k>", "c"),
    ("<think>never closed", "never closed", ""),
    ("<think></think>only said", "", "only said"),
    ("<thing> is no tag", "", "<thing> is no tag"),
    ("said <think>late</think>", "", "said <think>late</think>"),
    ("<think>a</think>b</think>c", "a", "b</think>c"),
    ("<thi", "", "<thi"),
    ("", "", ""),
]


@pytest.mark.parametrize(("text", "reasoning", "content"), CASES)
def test_a_whole_message_is_split(text: str, reasoning: str, content: str) -> None:
    parted = split_message({"role": "assistant", "content": text})
    assert parted.get("reasoning_content", "") == reasoning
    assert parted["content"] == content


def fed(pieces: list[str]) -> tuple[str, str]:
    splitter = ThinkingSplitter()
    parts = [*(splitter.feed(piece) for piece in pieces), splitter.finish()]
    return "".join(r for r, _ in parts), "".join(c for _, c in parts)


@given(st.sampled_from(CASES), st.data())
def test_however_the_stream_is_cut_the_parts_are_the_same(case: tuple[str, str, str], data: st.DataObject) -> None:
    text, reasoning, content = case
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert fed(pieces) == (reasoning, content)


@given(st.lists(st.text(alphabet="<think>/ ab\n", max_size=6), max_size=12))
def test_nothing_is_lost_or_made_up(pieces: list[str]) -> None:
    text = "".join(pieces)
    reasoning, content = fed(pieces)
    if text.lstrip().startswith("<think>"):
        inner, closed, rest = text.lstrip().removeprefix("<think>").partition("</think>")
        assert (reasoning, content) == (inner.strip(), rest.lstrip() if closed else "")
    else:
        assert (reasoning, content) == ("", text)


def test_a_closing_tag_alone_ends_thinking_that_began_in_the_prompt() -> None:
    parted = split_message({"role": "assistant", "content": "so\n</think>\n\nyes"})
    assert (parted["reasoning_content"], parted["content"]) == ("so", "yes")


def test_what_vllm_split_itself_is_passed_on_under_the_forks_name() -> None:
    assert split_message({"content": "yes", "reasoning": "so"}) == {"content": "yes", "reasoning_content": "so"}
    assert split_message({"content": None, "tool_calls": [1]}) == {"content": None, "tool_calls": [1]}
    chunk = {"choices": [{"index": 0, "delta": {"reasoning": "so"}, "finish_reason": None}]}
    assert DeltaSplitter().chunk(chunk)["choices"][0]["delta"] == {"reasoning_content": "so"}


def test_choices_of_one_stream_are_split_apart_and_what_is_held_comes_with_the_end() -> None:
    splitter = DeltaSplitter()
    seen: dict[int, dict[str, str]] = {0: {}, 1: {}}
    script: list[tuple[int, str | None, str | None]] = [
        (0, "<think>he", None), (1, "no <", None), (0, "llo</th", None), (1, "b", "stop"), (0, "ink>x", None),
        (0, None, "stop"),
    ]  # fmt: skip
    for index, text, finish in script:
        delta: dict[str, Any] = {} if text is None else {"content": text}
        chunk = splitter.chunk({"choices": [{"index": index, "delta": delta, "finish_reason": finish}]})
        for name, value in chunk["choices"][0]["delta"].items():
            seen[index][name] = seen[index].get(name, "") + value
    assert seen == {0: {"reasoning_content": "hello", "content": "x"}, 1: {"content": "no <b"}}
    assert splitter.chunk({"usage": {}, "choices": []}) == {"usage": {}, "choices": []}
