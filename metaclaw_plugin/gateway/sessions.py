"""Which session a request belongs to, which turn of it this is, and whether a human is behind it.

Evidence, strongest first: ``x-session-id``, ``x-litellm-session-id``, ``x-session-affinity`` or ``session_id`` headers,
``prompt_cache_key``, ``metadata.session_id`` (or the session that Claude Code writes into ``metadata.user_id``),
``previous_response_id``, OpenClaw's Runtime line, and last the conversation itself. All of it only ever chooses among
the agent's own sessions. ``user`` is no evidence: it would put a whole application into one bucket.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from metaclaw_hooks.types import Kind
from sqlalchemy.engine import Connection

from metaclaw_plugin.errors import StoreError
from metaclaw_plugin.gateway.conversation import (
    Conversation,
    extend_hash,
    read_conversation,
    recognise_kind,
    runtime_session,
)
from metaclaw_plugin.settings import Settings
from metaclaw_plugin.store import sessions as store
from metaclaw_plugin.store.sessions import Evidence, Place, split_epoch

_MAX_EVIDENCE = 400  # characters; longer values are no session ids
_MAX_RESPONSE_ID = 1000  # characters; LiteLLM encrypts those of the Responses route
_MAX_PAUSES = 64  # newest places at which the conversation may have paused that are looked up
_CLAUDE_CODE = re.compile(r"session_(?:id\W{1,8})?([0-9a-fA-F]{8}-[0-9a-fA-F-]{27})")
_NO = {"", "0", "no", "false", "off"}


@dataclass(frozen=True, slots=True)
class RequestEvidence:
    """A request as the client sent it: lower-case headers, body, messages (``input`` on the Responses route)."""

    headers: Mapping[str, str]
    body: Mapping[str, Any]
    messages: Sequence[Any] | None = None  # None: taken from the body


@dataclass(frozen=True, slots=True)
class Heard:
    """What a request says about its session: all that is read of its text, which may be long."""

    kind: Kind
    named: Evidence | None
    previous: str | None  # the response that it goes on from
    conversation: Conversation
    ends_session: bool  # the client says that this is its last request


@dataclass(frozen=True, slots=True)
class Turn:
    """Where a request stands."""

    agent: str
    session: str
    turn: int  # from 0, within the session
    exchange: int  # from 0: which human message of the session this answers
    kind: Kind
    held_out: bool
    new_exchange: bool
    adapter_version: int | None  # what a tool loop in progress is pinned to
    chain_hash: str  # of the conversation before the answer
    ends_session: bool  # the client says that this is its last request


def hear(evidence: RequestEvidence, settings: Settings) -> Heard:
    """Read a request; it takes as long as the request is, so call it outside any transaction."""
    messages = _messages(evidence)
    return Heard(
        kind=_kind(evidence, messages, settings),
        named=_named(evidence, messages),
        previous=_usable(evidence.body.get("previous_response_id"), _MAX_RESPONSE_ID),
        conversation=read_conversation(messages),
        ends_session=_says_yes(evidence.headers.get("x-session-done")),
    )


def resolve(c: Connection, agent: str, heard: Heard, now: float, settings: Settings) -> Turn:
    """Find or open the session of a request and count it. ``c`` must be a writing transaction."""
    conversation = heard.conversation
    one_in = settings.sessions.held_out_one_in
    anchor = conversation.anchor if heard.kind is Kind.MAIN else None
    if heard.named is not None:
        place = _named_place(c, agent, heard.named, conversation, anchor, now, one_in)
    elif (session := _goes_on(c, agent, heard, anchor is not None)) is not None:
        place = store.take_turn(c, session, now, anchor, conversation.in_tool_loop)
    else:
        place = store.open_unnamed(c, agent, now, one_in, anchor)
    return Turn(
        agent=agent,
        session=place.session,
        turn=place.turn,
        exchange=place.exchange,
        kind=heard.kind,
        held_out=place.held_out,
        new_exchange=place.new_exchange,
        adapter_version=place.adapter_version,
        chain_hash=conversation.hash,
        ends_session=heard.ends_session,
    )


def settle(c: Connection, turn: Turn, answers: Sequence[Mapping[str, Any]], now: float, pin: int | None) -> None:
    """Note where the conversation paused: after any of ``answers``, the choices' messages; none, if they are not whole.

    ``pin``: the adapter version that a tool loop goes on with, if the answer asks for a tool. Closes the session if the
    client said that this was its last request.
    """
    if turn.kind is Kind.MAIN:
        hashes = [extend_hash(turn.chain_hash, answer) for answer in answers]
        store.settle_turn(c, turn.agent, turn, hashes, now, pin)
    if answers and turn.ends_session:
        store.close_session(c, turn.session, "done", now)


def close_session(c: Connection, session: str, reason: str, now: float) -> bool:
    """Close the session; False if it was closed already.

    Raises:
        UnknownSessionError: if there is none.
    """
    return store.close_session(c, session, reason, now)


def close_idle_sessions(c: Connection, now: float, settings: Settings) -> list[str]:
    """Close sessions that have been idle for too long, a bounded number at a time; returns their ids."""
    return store.close_idle(c, now, settings.sessions.idle_timeout)


def _messages(evidence: RequestEvidence) -> Sequence[Any]:
    found: Any = evidence.messages
    if found is None:
        found = evidence.body.get("messages") or evidence.body.get("input")
    if isinstance(found, str):
        return [{"role": "user", "content": found}]
    return found if isinstance(found, list | tuple) else []


def _kind(evidence: RequestEvidence, messages: Sequence[Any], settings: Settings) -> Kind:
    said = evidence.headers.get("x-turn-type", "").strip().lower()
    if said in {Kind.MAIN, Kind.SIDE}:
        return Kind(said)
    system = evidence.body.get("system") or evidence.body.get("instructions")
    return recognise_kind(messages, system, bool(evidence.body.get("tools")), settings.sessions.side_phrases)


def _named(evidence: RequestEvidence, messages: Sequence[Any]) -> Evidence | None:
    headers, body = evidence.headers, evidence.body
    for header in ("x-session-id", "x-litellm-session-id"):
        if value := _usable(headers.get(header)):
            return Evidence(header, value)
    if value := _usable(headers.get("x-session-affinity")):
        return Evidence("affinity", *split_epoch(value))
    if value := _usable(headers.get("session_id")):
        return Evidence("affinity", value)
    if value := _usable(body.get("prompt_cache_key")):
        return Evidence("prompt_cache_key", value)
    metadata = body.get("metadata")
    if isinstance(metadata, Mapping):
        if value := _usable(metadata.get("session_id")):
            return Evidence("metadata", value)
        if found := _CLAUDE_CODE.search(str(metadata.get("user_id") or "")[:2000]):
            return Evidence("metadata", found[1])
    previous = _usable(body.get("previous_response_id"), _MAX_RESPONSE_ID)
    if previous is None and (value := _usable(runtime_session(messages))):
        return Evidence("runtime", value)
    return None


def _named_place(
    c: Connection,
    agent: str,
    named: Evidence,
    conversation: Conversation,
    anchor: str | None,
    now: float,
    one_in: int,
) -> Place:
    for _ in range(2):  # the second time round, another process opened the session in between
        if (session := store.find_named(c, agent, named, now)) is not None:
            return store.take_turn(c, session, now, anchor, conversation.in_tool_loop)
        if (place := store.open_session(c, agent, named, now, one_in, anchor)) is not None:
            return place
    raise StoreError(f"a session of agent {agent!r} is opened and closed at once; try again")


def _goes_on(c: Connection, agent: str, heard: Heard, main: bool) -> str | None:
    """The session whose answer, or whose conversation, the request goes on from."""
    found = store.find_by_response(c, agent, heard.previous) if heard.previous else None
    if found is None and main:
        found = store.find_by_chain(c, agent, heard.conversation.pauses(_MAX_PAUSES))
    return found


def _usable(value: Any, longest: int = _MAX_EVIDENCE) -> str | None:
    if not isinstance(value, str):
        return None
    value = value.strip()
    return value if 0 < len(value) <= longest else None


def _says_yes(value: str | None) -> bool:
    return value is not None and value.strip().lower() not in _NO
