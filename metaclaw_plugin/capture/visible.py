"""An answer as the client sees it, for upstreams behind which no tap can be put: text only, in any dialect.

Feed it every byte of the answer; ``reply`` is then a chat completion without token ids, and so never trainable.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from typing import Any

import orjson

from metaclaw_plugin.capture.reply import Choice, Reply

_MAX_WHOLE = 64 * 2**20  # bytes of an answer in one piece that are held

_STOPPED = {"end_turn": "stop", "stop_sequence": "stop", "max_tokens": "length", "tool_use": "tool_calls"}
_ENDED = {"completed": "stop", "incomplete": "length"}


class VisibleAnswer:
    """Reads one answer. ``complete`` once the dialect's own end mark has passed. Fails nobody, whatever comes."""

    def __init__(self, dialect: str, streams: bool, packed: bool = False) -> None:
        """``packed``: the bytes are compressed by gzip."""
        self.reply = Reply()
        self.complete = False
        self._dialect = dialect
        self._streams = streams
        self._rest = bytearray()
        self._unpack = zlib.decompressobj(wbits=31) if packed else None

    def feed(self, data: bytes) -> None:
        """Take in the next bytes."""
        self.reply.isolate(self._feed, data)

    def end(self) -> None:
        """That was all of it."""
        self.reply.isolate(self._end, None)

    def _feed(self, data: bytes) -> None:
        if self._unpack is not None:
            data = self._unpack.decompress(data)
        if len(self._rest) + len(data) > _MAX_WHOLE:
            self.reply.garbled = True
            return
        self._rest += data
        if self._streams:
            *lines, rest = bytes(self._rest).split(b"\n")
            self._rest = bytearray(rest)
            for line in lines:
                if line.startswith(b"data:"):
                    self._take(line[5:].strip())

    def _end(self, _: None) -> None:
        if not self._streams:
            self._take(bytes(self._rest))
            self._rest.clear()

    def _take(self, payload: bytes) -> None:
        if payload == b"[DONE]":
            self.complete = self.complete or self._dialect == "chat"
            return
        try:
            event = orjson.loads(payload)
        except orjson.JSONDecodeError:
            event = None
        if not isinstance(event, dict):
            self.reply.garbled = True
            return
        if self._dialect == "chat":
            self._take_chat(event)
        elif self._dialect == "messages":
            self._take_messages(event)
        else:
            self._take_responses(event)

    def _take_chat(self, event: dict[str, Any]) -> None:
        if self._streams:
            self.reply.add_event(event)
        else:
            self.reply.add_body(event)
            self.complete = True

    def _take_responses(self, event: dict[str, Any]) -> None:
        response = event.get("response") if self._streams else event
        if not isinstance(response, Mapping) or response.get("status") not in _ENDED:
            return
        choice = self._choice(response)
        choice.finish_reason = _ENDED[response["status"]]
        for item in _mappings(response.get("output")):
            if item.get("type") == "message":
                texts = [part["text"] for part in _mappings(item.get("content")) if isinstance(part.get("text"), str)]
                _say(choice, "content", "".join(texts))
            elif item.get("type") == "function_call":
                _call(choice, item.get("call_id"), item.get("name"), item.get("arguments"))
                choice.finish_reason = "tool_calls"
        self.complete = True

    def _take_messages(self, event: dict[str, Any]) -> None:
        if not self._streams:
            choice = self._choice(event)
            for block in _mappings(event.get("content")):
                self._block(choice, block)
            choice.finish_reason = _STOPPED.get(str(event.get("stop_reason")), event.get("stop_reason"))
            self.complete = True
            return
        kind, delta = event.get("type"), event.get("delta")
        if kind == "message_start" and isinstance(event.get("message"), Mapping):
            self._choice(event["message"])
        choice = self.reply.choices.get(0) or self._choice({})
        if kind == "content_block_start" and isinstance(event.get("content_block"), Mapping):
            self._block(choice, event["content_block"])
        elif kind == "content_block_delta" and isinstance(delta, Mapping):
            _say(choice, "content", delta.get("text"))
            _say(choice, "reasoning", delta.get("thinking"))
            if isinstance(delta.get("partial_json"), str) and choice.message.get("tool_calls"):
                choice.message["tool_calls"][-1]["function"]["arguments"] += delta["partial_json"]
        elif kind == "message_delta" and isinstance(delta, Mapping):
            choice.finish_reason = _STOPPED.get(str(delta.get("stop_reason")), delta.get("stop_reason"))
        elif kind == "message_stop":
            self.complete = True

    def _block(self, choice: Choice, block: Mapping[str, Any]) -> None:
        _say(choice, "content", block.get("text"))
        _say(choice, "reasoning", block.get("thinking"))
        if block.get("type") == "tool_use":
            given = block.get("input")
            _call(choice, block.get("id"), block.get("name"), "" if self._streams else json.dumps(given))

    def _choice(self, head: Mapping[str, Any]) -> Choice:
        for name in ("id", "model"):
            if getattr(self.reply, name) is None and isinstance(head.get(name), str):
                setattr(self.reply, name, head[name])
        return self.reply.choices.setdefault(0, Choice(0))


def _say(choice: Choice, name: str, text: object) -> None:
    if isinstance(text, str) and text:
        choice.message[name] = (choice.message.get(name) or "") + text


def _call(choice: Choice, call_id: object, name: object, arguments: object) -> None:
    function = {"name": name, "arguments": arguments if isinstance(arguments, str) else ""}
    choice.message.setdefault("tool_calls", []).append({"id": call_id, "type": "function", "function": function})


def _mappings(items: object) -> list[Mapping[str, Any]]:
    return [item for item in items if isinstance(item, Mapping)] if isinstance(items, list) else []
