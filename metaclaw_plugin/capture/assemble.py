"""A recording becomes traces: one for each choice, or none when nothing was answered."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import orjson
from metaclaw_hooks.types import Kind, SkillRef, Trace

from metaclaw_plugin.capture.reply import Choice, Reply, finished_message
from metaclaw_plugin.capture.transport import Recording
from metaclaw_plugin.capture.verdict import sampling_of, untrainable_reason
from metaclaw_plugin.settings import CaptureSettings


@dataclass(frozen=True, slots=True)
class Origin:
    """Whose request this was and what the gateway decided about it."""

    trace_id: str  # of the first choice; the request's id for all of them
    agent: str
    session: str
    turn: int
    exchange: int
    kind: Kind
    dialect: str  # "chat", "messages" or "responses"
    model: str
    adapter_version: int
    skills: tuple[SkillRef, ...]
    skill_generation: int


def traces_of(
    origin: Origin, recording: Recording, response_id: str | None, settings: CaptureSettings
) -> tuple[Trace, ...]:
    """The traces of an answered request, by choice; ``response_id`` is the one that the client saw."""
    if not recording.answered:
        return ()
    request = parse_request(recording.request_body)
    choices = sorted(recording.reply.choices.values(), key=lambda choice: choice.index)
    return tuple(_trace(origin, recording, request, choice, response_id, settings) for choice in choices)


def trace_id(first: str, index: int) -> str:
    """The id of choice ``index`` of the request whose first trace is ``first``."""
    return first if index == 0 else f"{first}-{index}"


def parse_request(body: bytes) -> Mapping[str, Any]:
    """The JSON object that the sampler was sent; empty if it was none."""
    try:
        request = orjson.loads(body)
    except orjson.JSONDecodeError:
        try:
            request = json.loads(body)
        except ValueError:
            request = None
    return request if isinstance(request, dict) else {}


def _objects(value: object) -> tuple[dict[str, Any], ...]:
    return tuple(item for item in value if isinstance(item, dict)) if isinstance(value, list) else ()


def _trace(
    origin: Origin,
    recording: Recording,
    request: Mapping[str, Any],
    choice: Choice,
    response_id: str | None,
    settings: CaptureSettings,
) -> Trace:
    reply: Reply = recording.reply
    reason = untrainable_reason(origin.kind, request, reply, choice, recording.complete, settings)
    return Trace(
        id=trace_id(origin.trace_id, choice.index),
        request_id=origin.trace_id,
        agent=origin.agent,
        session=origin.session,
        turn=origin.turn,
        exchange=origin.exchange,
        kind=origin.kind,
        route=origin.dialect,
        model=origin.model,
        adapter_version=origin.adapter_version,
        messages=_objects(request.get("messages")),
        tools=_objects(request.get("tools")),
        response=finished_message(choice),
        finish_reason=choice.finish_reason,
        prompt_token_ids=None if reply.prompt_token_ids is None else tuple(reply.prompt_token_ids),
        response_token_ids=None if choice.token_ids is None else tuple(choice.token_ids),
        response_logprobs=None if choice.logprobs is None else tuple(choice.logprobs),
        sampling=sampling_of(request),
        skills=origin.skills,
        skill_generation=origin.skill_generation,
        chat_template_hash=None,  # vLLM reports none
        response_id=response_id or reply.id,
        started_at=recording.started_at,
        first_token_at=recording.first_token_at,
        finished_at=recording.finished_at if recording.finished_at is not None else recording.started_at,
        trainable=reason is None,
        reason=reason,
    )
