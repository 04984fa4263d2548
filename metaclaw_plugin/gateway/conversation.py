"""What a request's messages say about the conversation that they belong to. Pure functions.

Messages of all three dialects become the same *steps*, so that a conversation keeps its hash when it comes back through
another door: roles and text alone, without ids (OpenClaw changes those of tool calls), reasoning, and the internal
message that OpenClaw moves to the tail. System prompts are left out too: clients put dates into them.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from metaclaw_hooks.types import Kind

INTERNAL_MARK = "<<<BEGIN_OPENCLAW_INTERNAL_CONTEXT>>>"
EMPTY = hashlib.sha256(b"").hexdigest()  # the hash of a conversation in which nothing was said

_SIDE_SYSTEM = ("Generate a concise session title", "You are a context summarization assistant")
_SIDE_HUMAN = ("Follow the heartbeat monitor scratch context",)
_SYSTEM_ROLES = ("system", "developer")  # a tuple: a client may send anything as a role
_RUNTIME = re.compile(r"^Runtime: [^\n]*?\bsessionId=([^\s|]{1,200})", re.M)
_THOUGHT = re.compile(r"\A\s*<think>.*?(?:</think>|\Z)", re.S)


@dataclass(frozen=True, slots=True)
class Step:
    """One thing said or done."""

    role: str  # "user", "assistant", "call", "result" or "other"
    text: str
    ends: bool  # the last step of its message: a place where a conversation may have paused


@dataclass(frozen=True, slots=True)
class Conversation:
    """The steps of one request, and the hash of the conversation after each."""

    steps: tuple[Step, ...]
    hashes: tuple[str, ...]  # hashes[i]: after steps[i]

    @property
    def hash(self) -> str:
        """Hash of all of it."""
        return self.hashes[-1] if self.hashes else EMPTY

    @property
    def in_tool_loop(self) -> bool:
        """The request brings tool results and no newer word from the human."""
        return bool(self.steps) and self.steps[-1].role == "result"

    @property
    def anchor(self) -> str:
        """Hash up to the newest human message; that of nothing, if there is none."""
        for step, digest in zip(reversed(self.steps), reversed(self.hashes), strict=True):
            if step.role == "user":
                return digest
        return EMPTY

    def pauses(self, newest: int) -> list[str]:
        """Hashes at which the conversation may have paused before this request, longest first, at most ``newest``.

        None if nothing but one message was said: a conversation pauses after an answer.
        """
        ends = [digest for step, digest in zip(self.steps, self.hashes, strict=True) if step.ends]
        return ends[-newest:][::-1] if len(ends) > 1 else []


def read_conversation(messages: Iterable[Any]) -> Conversation:
    """The conversation in the messages of a chat, Anthropic or Responses request; what is no message is left out."""
    steps = tuple(step for message in messages if isinstance(message, Mapping) for step in _steps(message))
    return Conversation(steps, tuple(_fold(EMPTY, steps)))


def extend_hash(digest: str, message: Mapping[str, Any]) -> str:
    """Hash of the conversation that had ``digest``, once ``message`` was added."""
    for following in _fold(digest, tuple(_steps(message))):
        digest = following
    return digest


def runtime_session(messages: Iterable[Any]) -> str | None:
    """The session id in OpenClaw's Runtime line, which ends the first human message."""
    for message in messages:
        if isinstance(message, Mapping) and message.get("role") == "user":
            text = text_of(message.get("content"))
            if not text.lstrip().startswith(INTERNAL_MARK):
                found = _RUNTIME.search(text)
                return found[1] if found else None
    return None


def recognise_kind(messages: Sequence[Any], system: Any, has_tools: bool, side_phrases: Sequence[str]) -> Kind:
    """Whether a request is the client's own business: a title, a compaction, a heartbeat.

    ``side_phrases`` are the owner's: each marks a request whose system prompt or newest human message holds it.
    """
    prompts = [text_of(system)]
    human = ""
    for message in messages:
        if not isinstance(message, Mapping):
            continue
        text = text_of(message.get("content"))
        if message.get("role") in _SYSTEM_ROLES:
            prompts.append(text)
        elif message.get("role") == "user" and not text.lstrip().startswith(INTERNAL_MARK):
            human = text
    prompt = "\n".join(prompts)
    if not has_tools and any(phrase in prompt for phrase in _SIDE_SYSTEM):
        return Kind.SIDE
    if any(phrase in human for phrase in _SIDE_HUMAN):
        return Kind.SIDE
    if any(phrase in prompt or phrase in human for phrase in side_phrases):
        return Kind.SIDE
    return Kind.MAIN


def text_of(content: Any) -> str:
    """The text of a string or a list of parts, in any dialect."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list | tuple):
        return ""
    texts = (part.get("text") for part in content if isinstance(part, Mapping))
    return "\n".join(text for text in texts if isinstance(text, str))


def _steps(message: Mapping[str, Any]) -> Iterator[Step]:
    found = list(_message_steps(message))
    for place, (role, text) in enumerate(found):
        yield Step(role, text, ends=place == len(found) - 1)


def _message_steps(message: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    kind, role, content = message.get("type"), message.get("role"), message.get("content")
    if kind == "function_call":  # Responses: an item of its own
        yield "call", _call(message.get("name"), message.get("arguments"))
    elif kind == "function_call_output":
        yield "result", text_of(message.get("output"))
    elif role == "tool":
        yield "result", text_of(content)
    elif role == "assistant":
        yield from _assistant_steps(message, content)
    elif role == "user":
        yield from _user_steps(content)
    elif isinstance(role, str) and role not in _SYSTEM_ROLES:
        yield "other", f"{role}\n{text_of(content)}"


def _assistant_steps(message: Mapping[str, Any], content: Any) -> Iterator[tuple[str, str]]:
    text = _THOUGHT.sub("", text_of(content)).strip()
    if text:
        yield "assistant", text
    calls = message.get("tool_calls")
    for call in calls if isinstance(calls, list) else ():
        function = call.get("function") if isinstance(call, Mapping) else None
        if isinstance(function, Mapping):
            yield "call", _call(function.get("name"), function.get("arguments"))
    for part in _parts(content, "tool_use"):  # Anthropic
        yield "call", _call(part.get("name"), part.get("input"))


def _user_steps(content: Any) -> Iterator[tuple[str, str]]:
    text = text_of(content).strip()
    if text.startswith(INTERNAL_MARK):
        return
    results = list(_parts(content, "tool_result"))
    images = [part for part in _parts(content) if part.get("type") not in {"text", "input_text", "tool_result"}]
    said = text + "".join("\n" + _canonical(part) for part in images)
    if results:  # what an Anthropic client adds to tool results is no new word from the human
        if said:
            yield "other", said
        for part in results:
            yield "result", text_of(part.get("content"))
    elif said:
        yield "user", said


def _parts(content: Any, kind: str | None = None) -> Iterator[Mapping[str, Any]]:
    for part in content if isinstance(content, list | tuple) else ():
        if isinstance(part, Mapping) and (kind is None or part.get("type") == kind):
            yield part


def _call(name: Any, arguments: Any) -> str:
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):  # what a model wrote need not be JSON; then it is compared as it is
            return f"{name}\n{arguments}"
    return f"{name}\n{_canonical(arguments)}"


def _canonical(value: Any) -> str:
    try:
        return json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)
    except RecursionError:
        return "(nested too deeply to be compared)"


def _fold(digest: str, steps: Iterable[Step]) -> Iterator[str]:
    for step in steps:
        said = f"{digest}\0{step.role}\0{step.text}"
        digest = hashlib.sha256(said.encode("utf-8", "surrogatepass")).hexdigest()
        yield digest
