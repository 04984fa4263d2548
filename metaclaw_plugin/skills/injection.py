"""What an agent is shown of its skills, and where (law 7).

The first selection of a session goes to the end of the system prompt. A skill that becomes relevant later enters with
the newest human message, never before it. Both are kept in the store and put back at the same place, with the same
bytes, in every later request of the session: otherwise the prompt would no longer extend the one before, and neither
vLLM's prefix cache nor the merging of samples would have anything to live off.
"""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import sqlalchemy as sa
from metaclaw_hooks.types import Agent, Kind, Mode, SkillRef, message_text

from metaclaw_plugin.skills.query import BLOCK_CLOSE, BLOCK_OPEN, humans_backwards
from metaclaw_plugin.skills.skill_file import Skill
from metaclaw_plugin.store.engine import add_or_ignore, insert_or_ignore
from metaclaw_plugin.store.schema import injections, skill_exposures

SYSTEM = "system"  # the anchor of the block in the system prompt
_SYSTEM_ROLES = ("system", "developer")
_PREAMBLE = "Skills that this assistant has learned. Follow those that fit the request; ignore the others."

Message = Mapping[str, Any]


class TurnLike(Protocol):
    """What of a turn decides about injection."""

    @property
    def session(self) -> str: ...
    @property
    def kind(self) -> Kind: ...
    @property
    def turn(self) -> int: ...
    @property
    def exchange(self) -> int: ...
    @property
    def new_exchange(self) -> bool: ...


@dataclass(frozen=True, slots=True)
class Anchored:
    """A request's messages, and where in them blocks may stand: all that injection reads of their text."""

    messages: Sequence[Message]
    places: Mapping[str, int]  # anchor -> index of the message that carries it; -1: one has yet to be made, in front
    newest: str | None  # the anchor of the newest human message


@dataclass(frozen=True, slots=True)
class Injection:
    """The messages to send upstream, and what of skills is in them."""

    messages: list[dict[str, Any]]
    skills: tuple[SkillRef, ...]
    generation: int  # of the agent's skills, when this was planned


@dataclass(frozen=True, slots=True)
class _Block:
    anchor: str
    text: str
    skills: tuple[SkillRef, ...]


_OF_SESSION = (
    sa.select(injections.c.anchor, injections.c.block, injections.c.skills)
    .where(injections.c.session == sa.bindparam("session"))
    .order_by(injections.c.at, injections.c.anchor)
)


def anchor_messages(messages: Sequence[Message]) -> Anchored:
    """Find where blocks may stand; reads every user message, so call it outside any transaction.

    A system message whose content is neither text nor parts is left for the upstream to refuse. Every user message has
    an anchor, by its text and which of its like it is; whether a human wrote it is asked from the newest on.
    """
    head = next((i for i, message in enumerate(messages) if message.get("role") in _SYSTEM_ROLES), -1)
    usable = head < 0 or isinstance(messages[head].get("content"), str | list | tuple | None)
    places = {SYSTEM: head} if usable else {}
    human = next(humans_backwards(messages), None)
    newest: str | None = None
    seen: Counter[str] = Counter()
    for index, message in enumerate(messages):
        if message.get("role") != "user":
            continue
        digest = hashlib.sha256(message_text(message).encode("utf-8", "surrogatepass")).hexdigest()[:40]
        seen[digest] += 1
        anchor = f"{digest}#{seen[digest]}"
        places[anchor] = index
        newest = anchor if index == human else newest
    return Anchored(messages, places, newest)


def plan_injection(
    c: sa.Connection,
    agent: Agent,
    turn: TurnLike,
    anchored: Anchored,
    chosen: Sequence[Skill],
    withheld_share: float = 0.0,
) -> Injection:
    """Put back what the session has, add what of ``chosen`` is new, and remember it.

    ``chosen`` counts on a new exchange only: the requests of a tool loop get what the exchange began with. Messages
    are chat messages as OpenAI defines them and are not changed; those that carry a block are copied.
    """
    plain = [dict(message) for message in anchored.messages]
    places = anchored.places
    if turn.kind is Kind.SIDE or agent.mode is Mode.OFF:
        return Injection(plain, (), agent.skill_generation)
    blocks = _load(c, turn.session) if turn.turn > 0 else []
    if turn.new_exchange:
        blocks += _select(c, agent, turn, anchored, blocks, chosen, withheld_share)
    present = [block for block in blocks if block.text and block.anchor in places]
    for block in sorted(present, key=lambda block: -places[block.anchor]):  # -1, which moves the others, comes last
        _apply(plain, places[block.anchor], block)
    skills = tuple(dict.fromkeys(ref for block in present for ref in block.skills))
    return Injection(plain, skills, agent.skill_generation)


def render_block(skills: Sequence[Skill]) -> str:
    """The delimited block that shows ``skills``, in their order."""
    return "\n\n".join([f"{BLOCK_OPEN}\n{_PREAMBLE}", *(skill.text for skill in skills)]) + f"\n{BLOCK_CLOSE}"


def is_withheld(session: str, skill: str, share: float) -> bool:
    """Whether ``session`` goes without ``skill``: a fixed coin for each pair, so that it holds all session long."""
    digest = hashlib.sha256(f"withheld\0{session}\0{skill}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def _select(
    c: sa.Connection,
    agent: Agent,
    turn: TurnLike,
    anchored: Anchored,
    blocks: Sequence[_Block],
    chosen: Sequence[Skill],
    withheld_share: float,
) -> list[_Block]:
    """Decide once for the newest human message what enters with it, and write the decision down, "nothing" too: a
    message that was sent before without a block may not get one when the request is sent again."""
    newest = anchored.newest
    if newest is None or newest in {block.anchor for block in blocks}:
        return []
    had = {ref.name for block in blocks if block.anchor in anchored.places for ref in block.skills}
    fresh = [skill for skill in chosen if skill.name not in had]
    shown = [skill for skill in fresh if not is_withheld(turn.session, skill.name, withheld_share)]
    # The system prompt is open to the session's first exchange alone: later, it is part of a prefix that was sent.
    opening = turn.exchange == 0 and not blocks
    text = render_block(shown) if shown else ""
    refs = tuple(skill.ref for skill in shown)
    decided = _Block(newest, "", ()) if opening else _Block(newest, text, refs)
    if not insert_or_ignore(c, injections, [_row(turn, decided)]):
        # Another request of this session was first: what it wrote is what the session has.
        return [block for block in _load(c, turn.session) if block not in blocks]
    added = [decided]
    if opening and shown:
        added.append(_Block(SYSTEM, text, refs))
        add_or_ignore(c, injections, [_row(turn, added[-1])])
    _expose(c, agent, turn, fresh, {skill.name for skill in shown})
    return added


def _row(turn: TurnLike, block: _Block) -> dict[str, Any]:
    return {
        "session": turn.session,
        "anchor": block.anchor,
        "block": block.text,
        "skills": [[ref.name, ref.version, ref.shared] for ref in block.skills],
        "at": time.time(),
    }


def _expose(c: sa.Connection, agent: Agent, turn: TurnLike, fresh: Sequence[Skill], shown: set[str]) -> None:
    rows = [
        {
            "session": turn.session,
            "skill": skill.name,
            "agent": agent.name,
            "version": skill.version,
            "shared": skill.shared,
            "withheld": skill.name not in shown,
            "exchange": turn.exchange,
            "at": time.time(),
        }
        for skill in fresh
    ]
    add_or_ignore(c, skill_exposures, rows)


def _load(c: sa.Connection, session: str) -> list[_Block]:
    rows = c.execute(_OF_SESSION, {"session": session})
    return [_Block(row.anchor, row.block, tuple(SkillRef(*entry) for entry in row.skills)) for row in rows]


def _apply(messages: list[dict[str, Any]], index: int, block: _Block) -> None:
    """Write the block at the end of its message; index -1: into a system message of its own, in front."""
    if index < 0:
        messages.insert(0, {"role": "system", "content": block.text})
        return
    message = messages[index]
    content = message.get("content")
    if isinstance(content, list | tuple):
        kinds = [part.get("type") for part in content if isinstance(part, Mapping)]
        kind = "input_text" if "input_text" in kinds else "text"
        message["content"] = [*content, {"type": kind, "text": block.text}]
    else:
        message["content"] = f"{content}\n\n{block.text}" if content else block.text
