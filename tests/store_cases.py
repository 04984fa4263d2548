"""What tests of the store put into it."""

from __future__ import annotations

import dataclasses
from typing import Any

import sqlalchemy as sa
from metaclaw_hooks.types import Kind, Sampling, SkillRef, Trace

from metaclaw_plugin.store.sessions import Evidence, open_session

TRACE = Trace(
    id="tr-0",
    request_id="req-0",
    agent="alpha",
    session="ses-0",
    turn=0,
    exchange=0,
    kind=Kind.MAIN,
    route="chat",
    model="alpha@v3",
    adapter_version=3,
    messages=(
        {"role": "system", "content": "You are terse."},
        {"role": "user", "content": [{"type": "text", "text": "hé \N{OTTER} \x00 \ud800"}]},
    ),
    tools=({"type": "function", "function": {"name": "exec", "parameters": {"type": "object", "properties": {}}}},),
    response={"role": "assistant", "content": None, "tool_calls": [{"id": "call_1", "function": {"name": "exec"}}]},
    finish_reason="tool_calls",
    prompt_token_ids=(0, 1, 2**31, 2**32 - 1),
    response_token_ids=(5, 6),
    response_logprobs=(-0.1, -1.2345678901234567e-300),
    sampling=Sampling(
        temperature=1.0, top_p=1.0, top_k=-1, max_tokens=16, stop=("\n",), seed=7, others={"logit_bias": {"5": 0.5}}
    ),
    skills=(SkillRef("be-terse", "0123456789ab", True),),
    skill_generation=2,
    chat_template_hash=None,
    response_id="chatcmpl-1",
    started_at=1_000.0,
    first_token_at=1_000.25,
    finished_at=1_001.5,
    trainable=True,
    reason=None,
)


def a_trace(**changes: Any) -> Trace:
    """The trace above, with ``changes``."""
    return dataclasses.replace(TRACE, **changes)


def opened(c: sa.Connection, agent: str, evidence: Evidence, at: float) -> str:
    """Id of a new session of ``agent``, not held out."""
    place = open_session(c, agent, evidence, at, one_in=0)
    assert place is not None
    return place.session
