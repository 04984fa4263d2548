"""The tap: an httpx transport between LiteLLM and vLLM, the one place where sampled tokens are whole.

LiteLLM's own parser drops the prompt's ids and the last token of a stream. So the request asks for ids and
log-probabilities, each event is recorded here as it passes, and what the client did not ask for is set back to null
before LiteLLM sees it. Chunks pass one for one; nothing is held but an unfinished line. Recording and hiding are two
things: what cannot be recorded is passed on without what we asked for, and counted.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field

import httpx
import orjson

from metaclaw_plugin.capture.reply import Json, Reply, choices_of

# LiteLLM writes the model first; the long rest of the body need not be parsed then.
_MODEL_IN_FRONT = re.compile(rb'\A(\{\s*"model"\s*:\s*)"[^"\\]*"')
_DROPPED_HEADERS = frozenset({b"content-encoding", b"content-length"})


@dataclass(slots=True)
class Recording:
    """What passed in one attempt to answer a request. ``over`` once nothing more can come."""

    keep_logprobs: bool  # the client asked for them itself
    keep_token_ids: bool
    model: str | None = None  # what to ask the upstream for, in the place of LiteLLM's name; None: that name
    kept: bool = True  # False: only the model is seen to
    request_body: bytes = b""
    status: int | None = None  # None: the upstream never answered
    reply: Reply = field(default_factory=Reply)
    complete: bool = False  # the upstream said that this was all
    over: bool = False
    started_at: float = field(default_factory=time.time)
    first_token_at: float | None = None
    finished_at: float | None = None

    @property
    def answered(self) -> bool:
        """Whether any part of an answer passed."""
        return self.status is not None and self.status < 300 and bool(self.reply.choices)

    def begin(self) -> None:
        """A request goes out: LiteLLM sends it once more by itself when a connection turns out to be dead."""
        self.status, self.reply, self.first_token_at = None, Reply(), None
        self.complete = self.over = False
        self.finished_at = None

    def end(self) -> None:
        """Nothing more will come."""
        if not self.over:
            self.over = True
            self.finished_at = time.time()

    def forget(self) -> None:
        """Let go of what was said; it has been taken over."""
        self.request_body = b""
        self.reply = Reply()


class TapTransport(httpx.AsyncBaseTransport):
    """Records what passes to and from ``inner``.

    ``find`` is asked which recording a request goes into; ``None``: it passes untouched.
    """

    def __init__(self, inner: httpx.AsyncBaseTransport, find: Callable[[], Recording | None]) -> None:
        self._inner = inner
        self._find = find

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        recording = self._find()
        if recording is None:
            return await self._inner.handle_async_request(request)
        request = await _with_model(request, recording.model)
        if not recording.kept:
            response = await self._inner.handle_async_request(request)
            recording.status = response.status_code
            return response
        recording.begin()
        request.headers["accept-encoding"] = "identity"
        recording.request_body = await request.aread()
        try:
            response = await self._inner.handle_async_request(request)
        except BaseException:
            recording.end()
            raise
        recording.status = response.status_code
        if response.status_code >= 300:
            recording.end()
            return response
        if response.headers.get("content-type", "").startswith("text/event-stream"):
            return _with_stream(response, _TappedStream(response, recording))
        return await _tap_body(response, recording)

    async def aclose(self) -> None:
        """Left open on purpose: LiteLLM closes clients that share this transport."""


async def _with_model(request: httpx.Request, model: str | None) -> httpx.Request:
    """The request for another model. Done here, so that LiteLLM goes on naming the one that the client asked for."""
    if model is None:
        return request
    body = await request.aread()
    name = json.dumps(model).encode()
    changed, found = _MODEL_IN_FRONT.subn(lambda match: match[1] + name, body, count=1)
    if not found:
        try:
            value, write = _parse(body)
            changed = write(value | {"model": model})
        except ValueError:
            return request
    headers = [(key, value) for key, value in request.headers.raw if key.lower() != b"content-length"]
    return httpx.Request(request.method, request.url, headers=headers, content=changed, extensions=request.extensions)


def _with_stream(response: httpx.Response, stream: httpx.AsyncByteStream) -> httpx.Response:
    headers = _kept_headers(response)
    return httpx.Response(response.status_code, headers=headers, stream=stream, extensions=response.extensions)


def _kept_headers(response: httpx.Response) -> list[tuple[bytes, bytes]]:
    """All headers but those that describe how the bytes came, since they are decoded here."""
    return [(key, value) for key, value in response.headers.raw if key.lower() not in _DROPPED_HEADERS]


async def _tap_body(response: httpx.Response, recording: Recording) -> httpx.Response:
    try:
        raw = await response.aread()  # decoded
    finally:
        recording.end()
        await response.aclose()
    try:
        body, write = _parse(raw)
    except (ValueError, RecursionError):
        recording.reply.garbled = True
    else:
        shown = _without_injected(body, recording)
        raw = raw if shown is None else write(shown)
        recording.reply.isolate(recording.reply.add_body, body)
        recording.complete = not recording.reply.garbled
    headers = [*_kept_headers(response), (b"content-length", str(len(raw)).encode())]
    return httpx.Response(response.status_code, headers=headers, content=raw, extensions=response.extensions)


class _TappedStream(httpx.AsyncByteStream):
    def __init__(self, response: httpx.Response, recording: Recording) -> None:
        self._response = response
        self._recording = recording
        self._rest = b""
        self._dropped = False  # the line before was kept back, so the blank one that ends its event is too

    async def __aiter__(self) -> AsyncIterator[bytes]:
        try:
            async for chunk in self._response.aiter_bytes():
                if passed := self._take(chunk):
                    yield passed
            if self._rest:
                yield self._line(self._rest)
        finally:
            self._recording.end()

    async def aclose(self) -> None:
        self._recording.end()
        await self._response.aclose()

    def _take(self, chunk: bytes) -> bytes:
        lines = (self._rest + chunk).split(b"\n")
        self._rest = lines.pop()
        return b"".join(self._line(line + b"\n") for line in lines)

    def _line(self, line: bytes) -> bytes:
        """The line as LiteLLM may see it."""
        if not line.startswith(b"data:"):
            dropped, self._dropped = self._dropped, False
            return b"" if dropped and not line.strip() else line
        payload = line[5:].strip()
        recording = self._recording
        if payload == b"[DONE]":
            recording.complete = not recording.reply.garbled
            recording.end()
            return line
        try:
            event, write = _parse(payload)
        except (ValueError, RecursionError):
            recording.reply.garbled = True
            return line
        if recording.first_token_at is None:
            recording.first_token_at = time.time()
        if not recording.keep_token_ids and _only_for_us(event):
            self._dropped, passed = True, b""
        else:
            shown = _without_injected(event, recording)
            passed = line if shown is None else b"data: " + write(shown) + b"\n"
        recording.reply.isolate(recording.reply.add_event, event)  # last, since it may change the event
        return passed


def _without_injected(event: Json, recording: Recording) -> Json | None:
    """The event with null where vLLM leaves null when it is not asked; ``None``: it is so already."""
    prompt = not recording.keep_token_ids and event.get("prompt_token_ids") is not None
    names = ([] if recording.keep_token_ids else ["token_ids"]) + ([] if recording.keep_logprobs else ["logprobs"])
    if not prompt and all(choice.get(name) is None for choice in choices_of(event) for name in names):
        return None
    shown = dict(event)
    if prompt:
        shown["prompt_token_ids"] = None
    if isinstance(choices := event.get("choices"), list):
        shown["choices"] = [_with_null(choice, names) if isinstance(choice, dict) else choice for choice in choices]
    return shown


def _with_null(choice: Json, names: Sequence[str]) -> Json:
    return {key: None if key in names else value for key, value in choice.items()}


def _only_for_us(event: Json) -> bool:
    """Whether vLLM sent this event only because token ids were asked for: a token that a parser held back."""
    choices = event.get("choices")
    return (
        isinstance(choices, list)
        and bool(choices)
        and all(
            isinstance(choice, dict) and choice.get("delta") == {} and choice.get("finish_reason") is None
            for choice in choices
        )
    )


def _parse(payload: bytes) -> tuple[Json, Callable[[Json], bytes]]:
    """A JSON object, and what writes such a one again without a loss."""
    try:
        value, write = orjson.loads(payload), _write
    except orjson.JSONDecodeError:
        value, write = _parse_oddities(payload), _write_oddities
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    return value, write


def _parse_oddities(payload: bytes) -> object:
    """What LiteLLM's own parser takes, and a strict one does not: NaN, half surrogate pairs, bytes that are no text."""
    try:
        return json.loads(payload)
    except UnicodeDecodeError:
        return json.loads(payload.decode("utf-8", "replace"))


def _write(value: Json) -> bytes:
    try:
        return orjson.dumps(value)
    except TypeError:  # it reads deeper than it writes
        return _write_oddities(value)


def _write_oddities(value: Json) -> bytes:
    try:
        return json.dumps(value, separators=(",", ":")).encode("ascii")
    except RecursionError as error:  # LiteLLM could not have read it either
        raise httpx.DecodingError("the upstream's answer is nested too deeply to be passed on") from error
