"""Traces and sessions as tests need them."""

from __future__ import annotations

import dataclasses
from typing import Any

from metaclaw_hooks.types import Kind, Message, Sampling, Session, Trace


def make_trace(
    *, agent: str = "alpha", text: str = "fine", messages: tuple[Message, ...] | None = None, **changes: Any
) -> Trace:
    """A trainable chat trace of three prompt tokens and two response tokens; ``changes`` replace any field."""
    trace = Trace(
        id="t1",
        request_id="r1",
        agent=agent,
        session="s1",
        turn=0,
        exchange=0,
        kind=Kind.MAIN,
        route="chat",
        model="metaclaw/metaclaw-base",
        adapter_version=0,
        messages=messages or ({"role": "user", "content": "How are you?"},),
        tools=(),
        response={"role": "assistant", "content": text},
        finish_reason="stop",
        prompt_token_ids=(1, 2, 3),
        response_token_ids=(4, 5),
        response_logprobs=(-0.5, -0.25),
        sampling=Sampling(temperature=1.0, top_p=1.0),
        skills=(),
        skill_generation=0,
        chat_template_hash=None,
        response_id="chatcmpl-1",
        started_at=1000.0,
        first_token_at=1000.1,
        finished_at=1001.0,
        trainable=True,
        reason=None,
    )
    return dataclasses.replace(trace, **changes)


def make_session(*traces: Trace, closed: bool = False, held_out: bool = False) -> Session:
    """The session of these traces."""
    first, last = traces[0], traces[-1]
    return Session(
        id=first.session,
        agent=first.agent,
        started_at=first.started_at,
        last_at=last.finished_at,
        closed_at=last.finished_at + 1 if closed else None,
        held_out=held_out,
        traces=traces,
    )
