"""A sample as a row of the table ``samples`` and back, exactly: float64 and uint32, little-endian."""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterable
from typing import Any

import sqlalchemy as sa
from metaclaw_hooks.types import Sample, SampleTurn


def encode_sample(sample: Sample) -> dict[str, Any]:
    """Column values of a sample, those of its state left out."""
    return {
        "id": sample.id,
        "agent": sample.agent,
        "session": sample.session,
        "adapter_version": sample.adapter_version,
        "skill_generation": sample.skill_generation,
        "hint": sample.hint,
        "tokens": len(sample.token_ids),
        "token_ids": pack("I", sample.token_ids),
        "turns": [[t.trace_id, t.start, len(t.logprobs), t.reward] for t in sample.turns],
        "logprobs": pack("d", (value for turn in sample.turns for value in turn.logprobs)),
    }


def decode_sample(row: sa.Row[Any]) -> Sample:
    """The sample of a row whose tokens are still there."""
    logprobs = unpack("d", row.logprobs)
    turns, cursor = [], 0
    for trace_id, start, length, reward in row.turns:
        turns.append(SampleTurn(trace_id, start, tuple(logprobs[cursor : cursor + length]), reward))
        cursor += length
    return Sample(
        id=row.id,
        agent=row.agent,
        session=row.session,
        token_ids=tuple(unpack("I", row.token_ids)),
        turns=tuple(turns),
        adapter_version=row.adapter_version,
        skill_generation=row.skill_generation,
        hint=row.hint,
    )


def pack(kind: str, values: Iterable[float]) -> bytes:
    """Numbers as bytes: ``I`` uint32, ``d`` float64; little-endian."""
    packed = array(kind, values)
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


def unpack(kind: str, data: bytes) -> array[Any]:
    """The numbers that ``pack`` made bytes of."""
    unpacked = array(kind, bytes(data))
    if sys.byteorder == "big":
        unpacked.byteswap()
    return unpacked
