"""What a model thought, apart from what it said: ``<think>...</think>`` at the start of an answer.

Where vLLM runs with a reasoning parser it has done this already, in the field ``reasoning``; that is passed on under
the name that the fork's clients read, ``reasoning_content``. Tags anywhere but at the start are the answer's own text.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

OPEN, CLOSE = "<think>", "</think>"


class ThinkingSplitter:
    """Splits one answer as it comes, piece by piece; what may still turn out to be a tag is held back."""

    def __init__(self) -> None:
        self._held = ""
        # "start", "opened" (blanks after the opening tag), "thinking", "gap" (blanks after the closing tag), "answer"
        self._place = "start"

    def feed(self, text: str) -> tuple[str, str]:
        """(reasoning, content) that this piece settles."""
        self._held += text
        reasoning = content = ""
        if self._place == "start":
            self._leave_start()
        if self._place == "opened" and (thought := self._held.lstrip()):
            self._held, self._place = thought, "thinking"
        if self._place == "thinking":
            reasoning = self._leave_thinking()
        if self._place == "gap" and (rest := self._held.lstrip()):
            self._held, self._place = rest, "answer"
        if self._place == "answer":
            content, self._held = self._held, ""
        return reasoning, content

    def finish(self) -> tuple[str, str]:
        """(reasoning, content) of what was held back, when no more comes."""
        held, self._held = self._held, ""
        if self._place == "thinking":
            return held.rstrip(), ""
        return "", "" if self._place in ("opened", "gap") else held

    def _leave_start(self) -> None:
        text = self._held.lstrip()
        if text.startswith(OPEN):
            self._held, self._place = text.removeprefix(OPEN), "opened"
        elif not OPEN.startswith(text):
            self._place = "answer"

    def _leave_thinking(self) -> str:
        thought, tag, rest = self._held.partition(CLOSE)
        if tag:
            self._held, self._place = rest, "gap"
            return thought.rstrip()
        keep = _tail_that_may_grow(self._held)
        settled, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return settled


def _tail_that_may_grow(text: str) -> int:
    """Length of the end of ``text`` that may be blanks before a closing tag, or the beginning of one."""
    tag = next((n for n in range(min(len(CLOSE) - 1, len(text)), 0, -1) if CLOSE.startswith(text[-n:])), 0)
    body = text[: len(text) - tag]
    return tag + len(body) - len(body.rstrip())


def split_message(message: Mapping[str, Any]) -> dict[str, Any]:
    """A whole assistant message, its thinking in ``reasoning_content``."""
    parted = dict(message)
    if parted.get("reasoning") is not None:
        parted["reasoning_content"] = parted.pop("reasoning")
    text = parted.get("content")
    if not isinstance(text, str) or parted.get("reasoning_content"):
        return parted
    if CLOSE in text and OPEN not in text:  # templates that put the opening tag into the prompt
        text = OPEN + text
    splitter = ThinkingSplitter()
    reasoning, content = splitter.feed(text)
    last_reasoning, last_content = splitter.finish()
    if thought := reasoning + last_reasoning:
        parted["reasoning_content"] = thought
        parted["content"] = content + last_content
    elif text.lstrip().startswith(OPEN):
        parted["content"] = content + last_content
    return parted


class DeltaSplitter:
    """Splits the chunks of a streamed chat completion; one for each stream."""

    def __init__(self) -> None:
        self._splitters: dict[int, ThinkingSplitter] = {}

    def chunk(self, chunk: dict[str, Any]) -> dict[str, Any]:
        """The chunk, with thinking moved to ``delta.reasoning_content``."""
        choices = chunk.get("choices")
        if isinstance(choices, list):
            chunk["choices"] = [self._choice(choice) for choice in choices]
        return chunk

    def _choice(self, choice: dict[str, Any]) -> dict[str, Any]:
        delta = dict(choice.get("delta") or {})
        if delta.get("reasoning") is not None:
            delta["reasoning_content"] = delta.pop("reasoning")
        splitter = self._splitters.setdefault(int(choice.get("index", 0)), ThinkingSplitter())
        reasoning = content = ""
        text = delta.get("content")
        if isinstance(text, str):
            reasoning, content = splitter.feed(text)
        if choice.get("finish_reason") is not None:
            last_reasoning, last_content = splitter.finish()
            reasoning, content = reasoning + last_reasoning, content + last_content
        if isinstance(text, str) or content:
            delta["content"] = content
        if reasoning:
            delta["reasoning_content"] = reasoning
        return {**choice, "delta": delta}
