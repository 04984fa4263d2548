"""A chat completion as it arrives, event by event or in one piece, put together without touching it.

Token ids and log-probabilities are only ever appended as the sampler sent them; what is missing stays missing.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

T = TypeVar("T")
Json = dict[str, Any]

_DELTA_KEYS_THAT_REPLACE = frozenset({"role", "id", "type", "index"})


@dataclass(slots=True)
class Choice:
    """One of the n answers to a request."""

    index: int
    message: Json = field(default_factory=lambda: {"role": "assistant", "content": None})
    finish_reason: str | None = None
    token_ids: list[int] | None = None  # None: the upstream sent none
    logprobs: list[float] | None = None  # of each sampled token; None: the upstream sent none


@dataclass(slots=True)
class Reply:
    """All that an upstream answered to one request."""

    id: str | None = None
    model: str | None = None
    prompt_token_ids: list[int] | None = None
    choices: dict[int, Choice] = field(default_factory=dict)
    garbled: bool = False  # something in it was no chat completion
    failure: str | None = None  # what of ours went wrong over it: nothing of it can be trusted then

    def isolate(self, step: Callable[[T], None], given: T) -> None:
        """Do one step of recording. If it fails, the answer is not recorded, and reaches the client all the same."""
        if self.failure is not None:
            return
        try:
            step(given)
        except Exception as error:  # noqa: BLE001 - isolation boundary: upstreams may say anything (law 5)
            self.failure = described(error)

    def add_event(self, event: Json) -> None:
        """Take in one event of a stream."""
        self._add_head(event)
        for part in choices_of(event):
            choice = self._choice(part)
            if choice is None:
                self.garbled = True
                continue
            delta = part.get("delta")
            if isinstance(delta, Mapping):
                _merge_delta(choice.message, delta)
            self._add_tokens(choice, part)

    def add_body(self, body: Json) -> None:
        """Take in an answer that came in one piece."""
        self._add_head(body)
        for part in choices_of(body):
            choice = self._choice(part)
            message = part.get("message")
            if choice is None or not isinstance(message, Mapping):
                self.garbled = True
                continue
            choice.message = {
                key: value for key, value in message.items() if key == "content" or value not in (None, [], {})
            }
            self._add_tokens(choice, part)

    def _add_head(self, event: Json) -> None:
        if self.id is None and isinstance(event.get("id"), str):
            self.id = event["id"]
        if self.model is None and isinstance(event.get("model"), str):
            self.model = event["model"]
        ids = event.get("prompt_token_ids")
        if ids is not None and self.prompt_token_ids is None:
            self.prompt_token_ids = ids if _all_ints(ids) else None
            self.garbled |= self.prompt_token_ids is None

    def _choice(self, part: Json) -> Choice | None:
        index = part.get("index", 0)
        if not isinstance(index, int):
            return None
        return self.choices.setdefault(index, Choice(index))

    def _add_tokens(self, choice: Choice, part: Json) -> None:
        if isinstance(part.get("finish_reason"), str):
            choice.finish_reason = part["finish_reason"]
        ids = part.get("token_ids")
        if ids is not None:
            if not _all_ints(ids):
                self.garbled = True
                return
            choice.token_ids = [] if choice.token_ids is None else choice.token_ids
            choice.token_ids.extend(ids)
        logprobs = part.get("logprobs")
        entries = logprobs.get("content") if isinstance(logprobs, Mapping) else None
        if entries is None:
            return
        try:
            values = [float(entry["logprob"]) for entry in entries]
        except (KeyError, TypeError, ValueError, OverflowError):
            self.garbled = True
            return
        choice.logprobs = [] if choice.logprobs is None else choice.logprobs
        choice.logprobs.extend(values)


def choices_of(event: Json) -> list[Json]:
    """The choices of a body or an event, as far as they are any."""
    choices = event.get("choices")
    return [part for part in choices if isinstance(part, dict)] if isinstance(choices, list) else []


def _all_ints(ids: object) -> bool:
    return isinstance(ids, list) and all(type(number) is int and 0 <= number < 2**32 for number in ids)


def _merge_delta(message: Json, delta: Mapping[str, Any]) -> None:
    """Strings grow, lists of indexed parts (tool calls) grow by index, anything else is replaced."""
    for key, value in delta.items():
        if value is None:
            continue
        known = message.get(key)
        if isinstance(value, str) and isinstance(known, str) and key not in _DELTA_KEYS_THAT_REPLACE:
            message[key] = known + value
        elif isinstance(value, list) and all(isinstance(part, Mapping) and "index" in part for part in value):
            _merge_indexed(message, key, value)
        elif isinstance(value, Mapping) and isinstance(known, dict):
            _merge_delta(known, value)
        elif isinstance(value, Mapping):
            message[key] = dict(value)
        else:
            message[key] = value


def _merge_indexed(message: Json, key: str, parts: list[Mapping[str, Any]]) -> None:
    if not parts:
        return
    known = message.get(key)
    if not isinstance(known, list):
        known = message[key] = []
    for part in parts:
        slot = next((item for item in known if isinstance(item, dict) and item.get("index") == part["index"]), None)
        if slot is None:
            known.append(slot := {"index": part["index"]})
        _merge_delta(slot, part)


def described(error: Exception) -> str:
    """What went wrong and where, for a log: without the error's own words, which may be an agent's."""
    frames = traceback.extract_tb(error.__traceback__)
    return f"{type(error).__name__} in {frames[-1].name}" if frames else type(error).__name__


def finished_message(choice: Choice) -> Json:
    """The choice's message as it goes into a later request: tool calls without their stream index."""
    calls = choice.message.get("tool_calls")
    if not isinstance(calls, list):
        return choice.message
    bare = [
        {key: value for key, value in call.items() if key != "index"} for call in calls if isinstance(call, Mapping)
    ]
    return {**choice.message, "tool_calls": bare}
