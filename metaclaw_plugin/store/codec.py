"""A trace as a row of the table ``traces`` and back, exact to the bit.

Messages, tools, response and the like go into one compressed JSON body; token ids and log-probabilities into binary
columns, so that a long prompt costs about a byte a token and no rounding happens.
"""

from __future__ import annotations

import json
import sys
import zlib
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from metaclaw_hooks.types import Kind, Purpose, Sampling, SkillRef, Trace

from metaclaw_plugin.errors import StoreError

_FAST = 1  # zlib level: the text is written on the request path, and most of it compresses well at any level
_LENGTHS = {"request_id": 64, "model": 200, "response_id": 1000, "finish_reason": 32, "reason": 400}


def encode_trace(trace: Trace) -> dict[str, Any]:
    """The row of ``trace``, without the worker's columns.

    Raises:
        StoreError: if a token id is no unsigned 32-bit integer, or a message is not JSON.
    """
    content = {
        "messages": list(trace.messages),
        "tools": list(trace.tools),
        "response": trace.response,
        "sampling": _sampling_to_json(trace.sampling),
        "skills": [[skill.name, skill.version, skill.shared] for skill in trace.skills],
        "chat_template_hash": trace.chat_template_hash,
    }
    try:
        # ASCII, since a client may have sent half a surrogate pair, which UTF-8 cannot hold.
        body = zlib.compress(json.dumps(content, separators=(",", ":")).encode("ascii"), _FAST)
        prompt = encode_ids(trace.prompt_token_ids)
        response = encode_ids(trace.response_token_ids)
        logprobs = encode_logprobs(trace.response_logprobs)
    except (TypeError, ValueError, OverflowError) as error:
        raise StoreError(f"trace {trace.id} of agent {trace.agent!r} cannot be stored: {error}") from error
    row: dict[str, Any] = {
        "id": trace.id,
        "agent": trace.agent,
        "session": trace.session,
        "turn": trace.turn,
        "exchange": trace.exchange,
        "kind": trace.kind.value,
        "route": trace.route,
        "adapter_version": trace.adapter_version,
        "skill_generation": trace.skill_generation,
        "started_at": trace.started_at,
        "first_token_at": trace.first_token_at,
        "finished_at": trace.finished_at,
        "trainable": trace.trainable,
        "purpose": trace.purpose.value,
        "prompt_tokens": None if trace.prompt_token_ids is None else len(trace.prompt_token_ids),
        "response_tokens": None if trace.response_token_ids is None else len(trace.response_token_ids),
        "size": sum(len(part) for part in (body, prompt, response, logprobs) if part is not None),
        "body": body,
        "prompt_token_ids": prompt,
        "response_token_ids": response,
        "response_logprobs": logprobs,
    }
    return row | {name: short_text(getattr(trace, name), length) for name, length in _LENGTHS.items()}


def decode_trace(row: Mapping[Any, Any]) -> Trace:
    """The trace that ``row`` was made of.

    Raises:
        StoreError: if the row is damaged.
    """
    try:
        content = json.loads(zlib.decompress(row["body"]))
        sampling = dict(content["sampling"])
        sampling["stop"] = tuple(sampling["stop"])
        return Trace(
            id=row["id"],
            request_id=row["request_id"],
            agent=row["agent"],
            session=row["session"],
            turn=row["turn"],
            exchange=row["exchange"],
            kind=Kind(row["kind"]),
            route=row["route"],
            model=row["model"],
            adapter_version=row["adapter_version"],
            messages=tuple(content["messages"]),
            tools=tuple(content["tools"]),
            response=content["response"],
            finish_reason=row["finish_reason"],
            prompt_token_ids=decode_ids(row["prompt_token_ids"]),
            response_token_ids=decode_ids(row["response_token_ids"]),
            response_logprobs=decode_logprobs(row["response_logprobs"]),
            sampling=Sampling(**sampling),
            skills=tuple(SkillRef(name, version, shared) for name, version, shared in content["skills"]),
            skill_generation=row["skill_generation"],
            chat_template_hash=content["chat_template_hash"],
            response_id=row["response_id"],
            started_at=row["started_at"],
            first_token_at=row["first_token_at"],
            finished_at=row["finished_at"],
            trainable=bool(row["trainable"]),
            reason=row["reason"],
            purpose=Purpose(row["purpose"]),
        )
    except (KeyError, TypeError, ValueError, zlib.error) as error:
        raise StoreError(f"trace {row['id']} in the store is damaged: {error}; delete it by its id") from error


def encode_ids(ids: Sequence[int] | None) -> bytes | None:
    """Token ids as little-endian uint32: all lowest bytes, then all second ones and so on, compressed by zlib.

    The upper bytes are nearly all alike, so that this takes about a quarter of the room. ``None`` stays ``None``.
    """
    if ids is None:
        return None
    plain = _bytes(array("I", ids))
    return zlib.compress(b"".join(plain[place::4] for place in range(4)), _FAST)


def decode_ids(data: bytes | None) -> tuple[int, ...] | None:
    """The inverse of ``encode_ids``.

    Raises:
        ValueError: if it is damaged.
    """
    if data is None:
        return None
    try:
        planes = zlib.decompress(data)
    except zlib.error as error:
        raise ValueError(f"token ids that cannot be read: {error}") from error
    count = len(planes) // 4
    plain = bytearray(len(planes))
    for place in range(4):
        plain[place::4] = planes[place * count : (place + 1) * count]
    return tuple(_array("I", bytes(plain)))


def encode_logprobs(logprobs: Sequence[float] | None) -> bytes | None:
    """Log-probabilities as little-endian float64; ``None`` stays ``None``."""
    return None if logprobs is None else _bytes(array("d", logprobs))


def decode_logprobs(data: bytes | None) -> tuple[float, ...] | None:
    """The inverse of ``encode_logprobs``."""
    return None if data is None else tuple(_array("d", data))


def short_text(value: str | None, length: int) -> str | None:
    """``value`` as any database takes it in a text column: no NUL, no half surrogate pair, at most ``length`` long."""
    if value is None:
        return None
    return value[:length].replace("\x00", "").encode("utf-8", "replace").decode("utf-8")


def _sampling_to_json(sampling: Sampling) -> dict[str, Any]:
    return {parameter.name: getattr(sampling, parameter.name) for parameter in fields(Sampling)}


def _bytes(values: array[Any]) -> bytes:
    if sys.byteorder == "big":
        values.byteswap()
    return values.tobytes()


def _array(code: str, data: bytes) -> array[Any]:
    values: array[Any] = array(code)
    values.frombytes(data)
    if sys.byteorder == "big":
        values.byteswap()
    return values
