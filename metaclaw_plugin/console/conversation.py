"""A session as the model saw it, piece by piece."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from metaclaw_hooks.types import Message, Reward, Trace
from sqlalchemy.engine import Connection

from metaclaw_plugin.console.shown import SHORT, split_skills
from metaclaw_plugin.store.codec import decode_trace
from metaclaw_plugin.store.schema import rewards, traces

TURNS = 10  # on a page
MESSAGES = 20  # of one turn that are shown at first
_FORWARD = {
    "waiting": "not forwarded yet",
    "merged": "merged into a sample, on its way to the trainer",
    "forwarded": "at the trainer",
    "trained": "trained on",
    "skipped": "never trained on",
}


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of one message: what was said, or skills that were injected."""

    injected: bool
    text: str  # at most SHORT characters
    left: int  # characters that are not shown


@dataclass(frozen=True, slots=True)
class Said:
    """One message as a page shows it."""

    index: int  # among the messages that the model saw; -1: its answer
    role: str
    pieces: tuple[Piece, ...]
    calls: tuple[tuple[str, str], ...]  # tool calls: name and arguments
    other: tuple[str, ...]  # kinds of parts that are no text, such as images


@dataclass(frozen=True, slots=True)
class Turn:
    """One request and its answer, with what became of it."""

    trace: Trace
    new: tuple[Said, ...]  # messages that the turn before did not have, the last MESSAGES of them
    skipped: int  # of the new ones, not shown
    answer: Said
    tools: tuple[str, ...]  # names
    rewards: tuple[Reward, ...]
    reward: float | None
    score: str
    forward: str
    forward_reason: str | None
    has_tokens: bool

    @property
    def verdict(self) -> str:
        """Whether it may be trained on, and what came of that, in one line."""
        if not self.trace.trainable:
            return f"not trainable: {self.trace.reason or 'no reason was given'}"
        reason = f": {self.forward_reason}" if self.forward == "skipped" and self.forward_reason else ""
        return f"trainable; {_FORWARD.get(self.forward, self.forward)}{reason}"


def said(index: int, message: Message, limit: int = SHORT) -> Said:
    """A message, cut to ``limit`` characters a piece; parts of unknown shape are named and not shown."""
    texts, other = _parts(message.get("content"))
    pieces = tuple(
        Piece(injected, piece[:limit], max(0, len(piece) - limit)) for injected, piece in split_skills("\n".join(texts))
    )
    calls = tuple(_call(call, limit) for call in message.get("tool_calls") or () if isinstance(call, Mapping))
    return Said(index, str(message.get("role") or "assistant")[:40], pieces, calls, tuple(other))


def _parts(content: Any) -> tuple[list[str], list[str]]:
    if content is None:
        return [], []
    if isinstance(content, str):
        return [content], []
    texts, other = [], []
    for part in content if isinstance(content, list | tuple) else [content]:
        text = part.get("text") if isinstance(part, Mapping) else None
        if isinstance(text, str):
            texts.append(text)
        else:
            kind = part.get("type") if isinstance(part, Mapping) else None
            other.append(str(kind or type(part).__name__)[:40])
    return texts, other


def _call(call: Mapping[str, Any], limit: int) -> tuple[str, str]:
    function = call.get("function")
    function = function if isinstance(function, Mapping) else {}
    arguments = function.get("arguments")
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False, default=str)
    return str(function.get("name") or "?")[:200], text[:limit]


def tool_name(tool: Mapping[str, Any]) -> str:
    function = tool.get("function")
    named = function if isinstance(function, Mapping) else tool
    return str(named.get("name") or "?")[:200]


def read_turns(c: Connection, session: str, first: int, count: int = TURNS) -> list[Turn]:
    """Turns ``first`` (from 0, in order) and the following of a session."""
    t = traces.c
    query = sa.select(traces).where(t.session == session).order_by(t.turn, t.seq)
    skip = max(0, first - 1)  # the turn before tells what is new in the first
    rows = c.execute(query.offset(skip).limit(count + first - skip)).mappings().all()
    opinions = _opinions(c, [row["id"] for row in rows])
    found: list[Turn] = []
    before: Sequence[Message] = ()
    for place, row in enumerate(rows, start=skip):
        trace = decode_trace(row)
        if place >= first:
            found.append(_turn(trace, before, row, opinions.get(trace.id, ())))
        before = (*trace.messages, trace.response)
    return found


def _turn(trace: Trace, before: Sequence[Message], row: sa.RowMapping, opinions: tuple[Reward, ...]) -> Turn:
    start = same_beginning(before, trace.messages)
    end = len(trace.messages)
    shown = max(start, end - MESSAGES)
    return Turn(
        trace=trace,
        new=tuple(said(index, trace.messages[index]) for index in range(shown, end)),
        skipped=shown - start,
        answer=said(-1, trace.response),
        tools=tuple(tool_name(tool) for tool in trace.tools),
        rewards=opinions,
        reward=row["reward"],
        score=row["score"],
        forward=row["forward"],
        forward_reason=row["forward_reason"],
        has_tokens=bool(trace.response_logprobs),
    )


def same_beginning(before: Sequence[Message], now: Sequence[Message]) -> int:
    """How many messages at the start of ``now`` were there before; an answer comes back with fields of the client's."""
    same = 0
    for old, new in zip(before, now, strict=False):
        if old != new and not _same_answer(old, new):
            break
        same += 1
    return same


def _same_answer(old: Message, new: Message) -> bool:
    both = old.get("role") == new.get("role") == "assistant"
    return both and (old.get("content") or "") == (new.get("content") or "")


def _opinions(c: Connection, trace_ids: Sequence[str]) -> dict[str, tuple[Reward, ...]]:
    r = rewards.c
    found: dict[str, tuple[Reward, ...]] = {}
    for row in c.execute(sa.select(rewards).where(r.trace_id.in_(trace_ids)).order_by(r.trace_id, r.source)):
        opinion = Reward(row.source, row.value, row.rationale, row.confidence, row.hint)
        found[row.trace_id] = (*found.get(row.trace_id, ()), opinion)
    return found
