"""Messages of all dialects as chat messages, and back."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest

from metaclaw_plugin.gateway.dialects import (
    Dialect,
    as_chat_request,
    chat_messages,
    dialect_of,
    error_body,
    in_dialect,
    put_messages,
)

USER = {"role": "user", "content": "hi"}
RESULT = {"type": "function_call_output", "call_id": "1", "output": "x"}


@pytest.mark.parametrize(
    ("path", "dialect"),
    [
        ("/v1/chat/completions", "chat"),
        ("/chat/completions", "chat"),
        ("/openai/deployments/m/chat/completions", "chat"),
        ("/v1/messages", "messages"),
        ("/v1/responses", "responses"),
        ("/responses", "responses"),
        ("/v1/messages/count_tokens", None),
        ("/v1/responses/resp_1", None),
        ("/v1/embeddings", None),
        ("/v1/models", None),
    ],
)
def test_paths_have_dialects(path: str, dialect: str | None) -> None:
    assert dialect_of(path) == dialect


REQUESTS: list[tuple[Dialect, dict[str, Any]]] = [
    ("chat", {"messages": [{"role": "system", "content": "s"}, USER]}),
    ("chat", {"messages": [USER]}),
    ("messages", {"system": "s", "messages": [USER]}),
    ("messages", {"system": [{"type": "text", "text": "s"}], "messages": [USER]}),
    ("messages", {"messages": [USER]}),
    ("responses", {"instructions": "s", "input": "hi"}),
    ("responses", {"input": "hi"}),
    (
        "responses",
        {"instructions": "s", "input": [USER, {"type": "function_call_output", "call_id": "1", "output": "x"}]},
    ),
    ("responses", {"input": [{"role": "developer", "content": "s"}, USER]}),
]


@pytest.mark.parametrize(("dialect", "data"), REQUESTS, ids=str)
def test_unchanged_messages_leave_the_request_as_it_was(dialect: Dialect, data: dict[str, Any]) -> None:
    before = copy.deepcopy(data)
    put_messages(dialect, data, chat_messages(dialect, data), chat_messages(dialect, data))
    assert data == before


@pytest.mark.parametrize(("dialect", "data"), REQUESTS, ids=str)
def test_a_block_put_into_the_system_prompt_is_there_and_nothing_else_changed(
    dialect: Dialect, data: dict[str, Any]
) -> None:
    data = copy.deepcopy(data)
    before = chat_messages(dialect, data)
    after = [dict(message) for message in before]
    if after[0].get("role") in ("system", "developer"):
        after[0]["content"] = "s and a block"
    else:
        after.insert(0, {"role": "system", "content": "a block"})
    put_messages(dialect, data, before, after)
    assert chat_messages(dialect, data) == after


@pytest.mark.parametrize(("dialect", "data"), REQUESTS, ids=str)
def test_a_block_put_into_the_newest_message_is_there(dialect: Dialect, data: dict[str, Any]) -> None:
    data = copy.deepcopy(data)
    before = chat_messages(dialect, data)
    after = [message | {"content": "hi and a block"} if message == USER else message for message in before]
    put_messages(dialect, data, before, after)
    assert chat_messages(dialect, data) == after


@pytest.mark.parametrize("odd", [None, 7, "x", [1, None, []], {"a": 1}])
@pytest.mark.parametrize("dialect", ["chat", "messages", "responses"])
def test_messages_that_are_none_are_left_out(dialect: Dialect, odd: Any) -> None:
    assert all(isinstance(m, dict) for m in chat_messages(dialect, {"messages": odd, "input": odd}))


def test_errors_are_put_into_anthropics_shape() -> None:
    body = json.dumps({"error": {"message": "no", "type": "x", "code": "401"}}).encode()
    assert json.loads(in_dialect("messages", 401, body)) == {
        "type": "error",
        "error": {"type": "authentication_error", "message": "no"},
    }


@pytest.mark.parametrize(
    "body", [b"", b"<html>", b"[]", b'{"detail": "x"}', json.dumps(error_body("messages", 400, "x")).encode()]
)
def test_other_errors_are_left_alone(body: bytes) -> None:
    assert in_dialect("messages", 400, body) == body


def test_a_request_to_a_cloud_model_is_told_as_a_chat_request() -> None:
    data = {"model": "claude", "system": "s", "messages": [USER], "temperature": 0.2, "metadata": {"secret": 1}}
    told = json.loads(as_chat_request("messages", data))
    assert told == {
        "model": "claude",
        "temperature": 0.2,
        "messages": [{"role": "system", "content": "s"}, USER],
    }
