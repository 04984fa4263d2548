"""Traces as JSON objects: field names as in ``types.Trace``, then what the worker made of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import sqlalchemy as sa
from metaclaw_hooks.types import Sampling, Trace
from sqlalchemy.engine import Connection

from metaclaw_plugin.store import schema
from metaclaw_plugin.store.traces import StoredTrace, TraceFilter, iter_stored

_SUMMARY = (
    "seq",
    "id",
    "request_id",
    "agent",
    "session",
    "turn",
    "exchange",
    "kind",
    "route",
    "model",
    "adapter_version",
    "response_id",
    "finish_reason",
    "started_at",
    "finished_at",
    "trainable",
    "reason",
    "prompt_tokens",
    "response_tokens",
    "size",
    "score",
    "reward",
    "purpose",
    "forward",
    "forward_reason",
)


def trace_json(trace: Trace) -> dict[str, Any]:
    """All fields of ``trace``, ready for ``json.dumps``."""
    record = {field.name: getattr(trace, field.name) for field in dataclasses.fields(Trace)}
    sampling = {field.name: getattr(trace.sampling, field.name) for field in dataclasses.fields(Sampling)}
    skills = [{"name": skill.name, "version": skill.version, "shared": skill.shared} for skill in trace.skills]
    return record | {"sampling": sampling, "skills": skills}


def stored_json(stored: StoredTrace) -> dict[str, Any]:
    """A stored trace: its fields, then ``score``, ``reward``, ``rewards`` and the rest of the worker's columns."""
    rewards = [
        {
            "source": reward.source,
            "value": reward.value,
            "confidence": reward.confidence,
            "rationale": reward.rationale,
            "hint": reward.hint,
        }
        for reward in stored.rewards
    ]
    return trace_json(stored.trace) | {
        "score": stored.score,
        "reward": stored.reward,
        "scored_at": stored.scored_at,
        "hint": stored.hint,
        "forward": stored.forward,
        "sample_id": stored.sample_id,
        "rewards": rewards,
    }


def export_traces(c: Connection, where: TraceFilter, limit: int | None = None) -> Iterator[dict[str, Any]]:
    """The records of all traces that ``where`` holds for, oldest first, one in memory at a time."""
    for stored in iter_stored(c, where, limit):
        yield stored_json(stored)


def list_summaries(c: Connection, where: TraceFilter, limit: int, newest_first: bool = False) -> list[dict[str, Any]]:
    """What a list shows of each trace: no messages, no tokens. Quick, whatever the traces hold."""
    t = schema.traces
    order = t.c.seq.desc() if newest_first else t.c.seq
    query = sa.select(*(t.c[name] for name in _SUMMARY)).where(*where.conditions()).order_by(order).limit(limit)
    return [dict(row) for row in c.execute(query).mappings()]
