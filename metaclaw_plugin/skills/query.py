"""What the human said, without what the client wrapped around it.

OpenClaw moves an internal user message to the tail of every request, stamps messages with the time, and ends the
first one with a line about its runtime; channels add blocks about who writes from where. Retrieval that reads any of
these finds the same skills on every turn.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from metaclaw_hooks.types import message_text

BLOCK_OPEN = "<metaclaw-skills>"
BLOCK_CLOSE = "</metaclaw-skills>"

_MAX_TEXT = 8_000  # characters of one message that retrieval reads; pasted logs go on for ever
_MAX_CONTEXT = 4_000
_MAX_PASSED_OVER = 1_000_000  # characters
_MAX_EARLIER = 20  # messages of the human before the newest that are looked at for the context

# Every pattern is linear in the text, whatever a client repeats in it: nothing lazy, nothing nested, and blocks, which
# end far from where they began, are cut out by looking for their end once.
_LINES = tuple(
    re.compile(pattern, flags)
    for pattern, flags in (
        (r"^Runtime:[ \t]+\w+=[^\n]*$", re.M),
        (r"^System:[ \t]+\[[^\]\n]{4,60}\][^\n]*$", re.M),
        (r"^\[message_id:[^\]\n]*\][ \t]*$", re.M),
        (r"^\[(?:from|channel|sender|reply to)[: ][^\]\n]{0,200}\][ \t]*", re.M | re.I),
        # "[Sun 2026-11-22 02:16 UTC] " and "[Telegram Ann id:7 +2m 2026-11-22T02:16Z] "
        (r"^\[[^\]\n]{0,120}?\d{4}-\d{2}-\d{2}[T ]\d{1,2}:\d{2}[^\]\n]{0,40}\][ \t]*", re.M),
        (r"data:[\w/+.-]{1,60};base64,[A-Za-z0-9+/=]+", 0),
    )
)
_INTERNAL = ("<<<BEGIN_OPENCLAW_INTERNAL_CONTEXT>>>", "<<<END_OPENCLAW_INTERNAL_CONTEXT>>>")
_TAGS = ("system-reminder", "environment_details", "channel_metadata")
# "Sender (untrusted metadata):" and the like, each with a fenced block of JSON under it
_FENCED = re.compile(r"^[^\n]{0,80}\(untrusted[^\n)]{0,60}\):[ \t]*\n```(?:json)?\n", re.M)
_FENCE = re.compile(r"\n```[ \t]*$", re.M)


@dataclass(frozen=True, slots=True)
class Query:
    """What to retrieve for: ``text`` is the newest human message; ``context``, weaker, what was asked before it."""

    text: str
    context: str = ""


def clean(text: str) -> str:
    """``text`` without time stamps, channel metadata, runtime lines, internal context and blocks of ours."""
    text = text[: 4 * _MAX_TEXT]
    for begin, end in (_INTERNAL, (BLOCK_OPEN, BLOCK_CLOSE)):
        text = without_blocks(text, begin, end, to_the_end=True)
    text = _without_fenced(text)
    for tag in _TAGS:
        text = without_blocks(text, f"<{tag}>", f"</{tag}>", to_the_end=False)
    for pattern in _LINES:
        text = pattern.sub("", text)
    return text.strip()[:_MAX_TEXT]


def without_blocks(text: str, begin: str, end: str, to_the_end: bool) -> str:
    """``text`` without what stands from ``begin`` to ``end``; a block that never ends goes ``to_the_end``, or stays."""
    kept: list[str] = []
    done = 0
    while (start := text.find(begin, done)) >= 0:
        stop = text.find(end, start + len(begin))
        if stop < 0 and not to_the_end:
            break
        kept.append(text[done:start])
        done = len(text) if stop < 0 else stop + len(end)
    return "".join([*kept, text[done:]])


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


def humans_backwards(messages: Sequence[Mapping[str, Any]]) -> Iterator[int]:
    """Indexes of the messages that a human wrote, newest first; what is not asked for is not read.

    Past so many characters of the client's own words, nobody looks for a human behind them.
    """
    patience = _MAX_PASSED_OVER
    for index in range(len(messages) - 1, -1, -1):
        if is_human(messages[index]):
            yield index
        elif messages[index].get("role") == "user":
            patience -= min(len(message_text(messages[index])), 4 * _MAX_TEXT)
            if patience < 0:
                return


def awaits_answer(messages: Sequence[Mapping[str, Any]]) -> bool:
    """True if nothing but the client's own words follows the newest human message: a new exchange, no tool loop."""
    newest = next(humans_backwards(messages), None)
    if newest is None:
        return False
    return all(message.get("role") in ("user", "system", "developer") for message in messages[newest + 1 :])


def build_query(messages: Sequence[Mapping[str, Any]]) -> Query:
    """The query for the newest human message: it, and what the human asked before (newest first, bounded)."""
    humans = humans_backwards(messages)
    newest = next(humans, None)
    if newest is None:
        return Query("")
    context = ""
    for index in islice(humans, _MAX_EARLIER):
        if text := clean(message_text(messages[index])):
            context = f"{context}\n{text}" if context else text
        if len(context) >= _MAX_CONTEXT:
            break
    return Query(clean(message_text(messages[newest])), context[:_MAX_CONTEXT])


def _without_fenced(text: str) -> str:
    """``text`` without what channels say of the sender, each with the fenced block under it."""
    kept: list[str] = []
    done = 0
    while (opening := _FENCED.search(text, done)) is not None:
        fence = _FENCE.search(text, opening.end())
        if fence is None:
            break
        kept.append(text[done : opening.start()])
        done = fence.end()
    return "".join([*kept, text[done:]])
