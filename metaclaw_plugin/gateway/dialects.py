"""The three dialects that clients speak: their paths, their messages as chat messages, their errors."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

Dialect = Literal["chat", "messages", "responses"]
Message = dict[str, Any]

# Those of LiteLLM's own routes alone: what else begins with /openai is passed on to OpenAI with the owner's key.
_PATHS: tuple[tuple[re.Pattern[str], Dialect], ...] = (
    (re.compile(r"(/v1)?/chat/completions|/(engines|openai/deployments)/.+/chat/completions"), "chat"),
    (re.compile(r"/v1/messages"), "messages"),
    (re.compile(r"(/openai/v1|/v1)?/responses"), "responses"),
)
CALL_TYPES: Mapping[str, Dialect] = {
    "acompletion": "chat",
    "completion": "chat",
    "anthropic_messages": "messages",
    "aresponses": "responses",
    "responses": "responses",
}
_ANTHROPICS_KINDS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    503: "overloaded_error",
}
_OPENAIS_KINDS = {401: "authentication_error", 403: "permission_error", 503: "server_error"}


def dialect_of(path: str) -> Dialect | None:
    """The dialect of a request to ``path``; ``None``: it asks for no answer of a model."""
    return next((dialect for pattern, dialect in _PATHS if pattern.fullmatch(path)), None)


def chat_messages(dialect: Dialect, data: Mapping[str, Any]) -> list[Message]:
    """The request's messages, system prompt first, in the shape of chat messages; nothing in them is changed."""
    if dialect == "chat":
        return _dicts(data.get("messages"))
    if dialect == "messages":
        head, rest = data.get("system"), _dicts(data.get("messages"))
    else:
        given = data.get("input")
        head = data.get("instructions")
        rest = [{"role": "user", "content": given}] if isinstance(given, str) else _dicts(given)
    return [{"role": "system", "content": head}, *rest] if head else rest


def put_messages(dialect: Dialect, data: dict[str, Any], before: Sequence[Message], after: Sequence[Message]) -> None:
    """Write messages that injection changed back into the request; ``before`` is what ``chat_messages`` gave."""
    if list(before) == list(after):
        return
    if dialect == "chat":
        data["messages"] = list(after)
        return
    head_name, body_name = ("system", "messages") if dialect == "messages" else ("instructions", "input")
    headed = bool(data.get(head_name)) or len(after) > len(before)
    rest = list(after[1:] if headed else after)
    if headed:
        data[head_name] = after[0]["content"]
    if dialect == "responses" and isinstance(data.get("input"), str):
        data["input"] = rest[0]["content"]
    else:
        data[body_name] = rest


def error_body(dialect: Dialect, status: int, message: str) -> dict[str, Any]:
    """An error as the caller's dialect has it."""
    if dialect == "messages":
        kind = _ANTHROPICS_KINDS.get(status, "invalid_request_error")
        return {"type": "error", "error": {"type": kind, "message": message}}
    return {
        "error": {
            "message": message,
            "type": _OPENAIS_KINDS.get(status, "invalid_request_error"),
            "param": None,
            "code": str(status),
        }
    }


def in_dialect(dialect: Dialect, status: int, body: bytes) -> bytes:
    """An error body as the caller's dialect has it; one that is not in OpenAI's shape is left alone."""
    try:
        said = json.loads(body)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        return body
    if dialect != "messages" or b'"type":"error"' in body.replace(b" ", b""):
        return body
    return json.dumps(error_body(dialect, status, str(said))).encode()


def as_chat_request(dialect: Dialect, data: Mapping[str, Any]) -> bytes:
    """The request in the shape of a chat request, as far as a trace goes."""
    names = ("model", "tools", "temperature", "top_p", "top_k", "max_tokens", "stop", "seed")
    chat = {name: data[name] for name in names if data.get(name) is not None}
    return json.dumps(chat | {"messages": chat_messages(dialect, data)}, default=str).encode()


def _dicts(items: object) -> list[Message]:
    return [item for item in items if isinstance(item, dict)] if isinstance(items, list) else []
