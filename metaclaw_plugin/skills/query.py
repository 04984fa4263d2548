"""What the human said, without what the client wrapped around it.

OpenClaw moves an internal user message to the tail of every request, stamps messages with the time, and ends the
first one with a line about its runtime; channels add blocks about who writes from where. Retrieval that reads any of
these finds the same skills on every turn.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from metaclaw_hooks.types import message_text

BLOCK_OPEN = "<metaclaw-skills>"
BLOCK_CLOSE = "</metaclaw-skills>"

_MAX_TEXT = 8_000  # characters of one message that retrieval reads; pasted logs go on for ever
_MAX_CONTEXT = 4_000

_REMOVED = tuple(
    re.compile(pattern, flags)
    for pattern, flags in (
        (r"<<<BEGIN_OPENCLAW_INTERNAL_CONTEXT>>>.*?(?:<<<END_OPENCLAW_INTERNAL_CONTEXT>>>|\Z)", re.S),
        (re.escape(BLOCK_OPEN) + r".*?(?:" + re.escape(BLOCK_CLOSE) + r"|\Z)", re.S),
        # "Sender (untrusted metadata):" and the like, each with a fenced block of JSON under it
        (r"^[^\n]{0,80}\(untrusted[^\n)]{0,60}\):[ \t]*\n```(?:json)?\n.*?\n```[ \t]*$", re.S | re.M),
        (r"<(system-reminder|environment_details|channel_metadata)>.*?</\1>", re.S),
        (r"^Runtime:[ \t]+\w+=[^\n]*$", re.M),
        (r"^System:[ \t]+\[[^\]\n]{4,60}\][^\n]*$", re.M),
        (r"^\[message_id:[^\]\n]*\][ \t]*$", re.M),
        (r"^\[(?:from|channel|sender|reply to)[: ][^\]\n]{0,200}\][ \t]*", re.M | re.I),
        # "[Sun 2026-11-22 02:16 UTC] " and "[Telegram Ann id:7 +2m 2026-11-22T02:16Z] "
        (r"^\[[^\]\n]{0,120}?\d{4}-\d{2}-\d{2}[T ]\d{1,2}:\d{2}[^\]\n]{0,40}\][ \t]*", re.M),
        (r"data:[\w/+.-]{1,60};base64,[A-Za-z0-9+/=]+", 0),
    )
)


@dataclass(frozen=True, slots=True)
class Query:
    """What to retrieve for: ``text`` is the newest human message; ``context``, weaker, what was asked before it."""

    text: str
    context: str = ""


def clean(text: str) -> str:
    """``text`` without time stamps, channel metadata, runtime lines, internal context and blocks of ours."""
    text = text[: 4 * _MAX_TEXT]
    for pattern in _REMOVED:
        text = pattern.sub("", text)
    return text.strip()[:_MAX_TEXT]


def is_human(message: Mapping[str, Any]) -> bool:
    """True for a user message that a human wrote: neither the client's internal context nor bare tool results."""
    if message.get("role") != "user":
        return False
    text = message_text(message).lstrip()
    if text:  # what a client writes by itself begins with a mark of some kind
        return text[0] not in "<[S" or bool(clean(text))
    content = message.get("content")
    if not isinstance(content, list | tuple):
        return False
    return any(isinstance(part, Mapping) and part.get("type") != "tool_result" for part in content)


def human_indexes(messages: Sequence[Mapping[str, Any]]) -> list[int]:
    """Indexes of the messages that a human wrote, oldest first."""
    return [index for index, message in enumerate(messages) if is_human(message)]


def awaits_answer(messages: Sequence[Mapping[str, Any]]) -> bool:
    """True if nothing but the client's own words follows the newest human message: a new exchange, no tool loop."""
    humans = human_indexes(messages)
    if not humans:
        return False
    return all(message.get("role") in ("user", "system", "developer") for message in messages[humans[-1] + 1 :])


def build_query(messages: Sequence[Mapping[str, Any]]) -> Query:
    """The query for the newest human message: it, and what the human asked before (newest first, bounded)."""
    texts = [clean(message_text(messages[index])) for index in human_indexes(messages)]
    if not texts:
        return Query("")
    earlier = "\n".join(text for text in reversed(texts[:-1]) if text)
    return Query(texts[-1], earlier[:_MAX_CONTEXT])
