"""The nouns, frozen. Read from top to bottom:

    Agent ── has ──► Session ── of ──► Trace ── scored into ──► Reward
                                         │ merged into
                                         ▼
                                       Sample ── trained into ──► AdapterVersion

Times are Unix seconds (float, UTC). Token ids are those that the sampler drew; nothing here is ever re-tokenised.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from metaclaw_hooks.errors import InvalidRewardError, InvalidSampleError
from metaclaw_hooks.names import version_name

Message = Mapping[str, Any]  # a chat message as OpenAI defines it, exactly as the model saw it

BASE_VERSION = 0  # the adapter version of the base model itself


class Mode(StrEnum):
    """What happens to an agent's traffic."""

    OFF = "off"  # pass through
    SKILLS_ONLY = "skills_only"  # skills are injected, traces are kept
    RL = "rl"  # and trained on when a batch is full
    AUTO = "auto"  # and trained on inside windows


class Kind(StrEnum):
    """Whether a request belongs to the conversation with the human."""

    MAIN = "main"
    SIDE = "side"  # titles, compaction, heartbeats: stored, never injected, chained or trained


class Purpose(StrEnum):
    """What a trace may be used for; settled before it is forwarded (law 8)."""

    UNSETTLED = "unsettled"
    QUERY = "query"  # may be trained on
    SUPPORT = "support"  # the evolver has seen it: never trained on
    HELD_OUT = "held_out"  # feeds the replay set: never trained on


class VersionState(StrEnum):
    """An adapter version's life: candidate -> serving -> retired, or rejected."""

    CANDIDATE = "candidate"
    SERVING = "serving"
    RETIRED = "retired"
    REJECTED = "rejected"


@dataclass(frozen=True, slots=True)
class Agent:
    """Whose skills, traces and weights these are."""

    name: str  # slug
    mode: Mode
    skill_generation: int = 0
    settings: Mapping[str, Any] = field(default_factory=dict)  # what the owner set for this agent alone


@dataclass(frozen=True, slots=True)
class SkillRef:
    """Which bytes of which skill were injected."""

    name: str
    version: str  # first 12 hex digits of the sha256 of its SKILL.md
    shared: bool  # from _shared, or the agent's own


@dataclass(frozen=True, slots=True)
class Sampling:
    """Parameters that the sampler ran with; ``None``: neither client nor gateway set it."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    seed: int | None = None
    others: Mapping[str, Any] = field(default_factory=dict)  # as sent: what else decides which tokens may be drawn


@dataclass(frozen=True, slots=True)
class Trace:
    """One request and one response to it, captured.

    ``response_logprobs[i]`` is the natural log-probability, before temperature, of ``response_token_ids[i]``; the end
    token is included when the sampler drew it. All three token fields are ``None`` when the upstream gave none.
    """

    id: str
    request_id: str  # shared by the n choices of one request
    agent: str
    session: str
    turn: int  # from 0, within the session
    exchange: int  # from 0: which human message of the session this answers
    kind: Kind
    route: str  # "chat", "messages" or "responses": the client's dialect
    model: str  # what the upstream was asked for
    adapter_version: int  # 0: the base model
    messages: tuple[Message, ...]  # as the model saw them, injected skills included
    tools: tuple[Mapping[str, Any], ...]
    response: Message
    finish_reason: str | None
    prompt_token_ids: tuple[int, ...] | None
    response_token_ids: tuple[int, ...] | None
    response_logprobs: tuple[float, ...] | None
    sampling: Sampling
    skills: tuple[SkillRef, ...]
    skill_generation: int
    chat_template_hash: str | None
    response_id: str | None  # the id that the client saw
    started_at: float
    first_token_at: float | None
    finished_at: float
    trainable: bool
    reason: str | None  # why not trainable
    purpose: Purpose = Purpose.UNSETTLED

    @property
    def response_text(self) -> str:
        """The text of the answer, without reasoning; empty for a pure tool call."""
        return message_text(self.response)

    @property
    def last_user_text(self) -> str:
        """The text of the newest user message that is not a client's internal context."""
        for message in reversed(self.messages):
            text = message_text(message)
            if message.get("role") == "user" and not text.startswith("<<<BEGIN_OPENCLAW_INTERNAL_CONTEXT>>>"):
                return text
        return ""


@dataclass(frozen=True, slots=True)
class Session:
    """The ordered traces of one conversation of one agent."""

    id: str
    agent: str
    started_at: float
    last_at: float
    closed_at: float | None  # None: still open
    held_out: bool
    traces: tuple[Trace, ...] = ()


@dataclass(frozen=True, slots=True)
class Reward:
    """One opinion from one source. No opinion is ``None`` in a Reward's place, never a Reward of 0.0."""

    source: str  # plugin name, such as "judge"
    value: float  # in [-1, 1]
    rationale: str = ""
    confidence: float = 1.0  # in (0, 1], weighs when rewards are combined
    hint: str | None = None  # how the answer should have been (hindsight)

    def __post_init__(self) -> None:
        if not self.source:
            raise InvalidRewardError("a reward needs a source: the name of whoever gives it")
        for label, number, low in (("value", self.value, -1.0), ("confidence", self.confidence, 0.0)):
            if isinstance(number, bool) or not isinstance(number, int | float) or not math.isfinite(number):
                raise InvalidRewardError(f"{label} {number!r} of the reward from {self.source!r} is no finite number")
            if not low <= number <= 1.0:
                raise InvalidRewardError(f"{label} {number} of the reward from {self.source!r} is outside [{low:g}, 1]")


@dataclass(frozen=True, slots=True)
class SampleTurn:
    """One sampled span of a sample: the loss sees these positions and no others."""

    trace_id: str
    start: int  # index of the first sampled token in ``Sample.token_ids``
    logprobs: tuple[float, ...]  # of each sampled token, from the sampler, before temperature
    reward: float

    @property
    def end(self) -> int:
        """Index after the last sampled token."""
        return self.start + len(self.logprobs)


@dataclass(frozen=True, slots=True)
class Sample:
    """What the loss sees: consecutive turns of one session under one adapter version, merged token by token."""

    id: str  # idempotency key: derived from the trace ids alone
    agent: str
    session: str
    token_ids: tuple[int, ...]  # length T
    turns: tuple[SampleTurn, ...]  # in order, not overlapping
    adapter_version: int
    skill_generation: int
    hint: str | None = None

    def __post_init__(self) -> None:
        cursor = 1  # the first token has no prediction
        if not self.turns:
            raise InvalidSampleError(f"sample {self.id}: no turn, so nothing to learn from")
        for turn in self.turns:
            if turn.start < cursor or turn.end > len(self.token_ids) or not turn.logprobs:
                raise InvalidSampleError(
                    f"sample {self.id}: turn {turn.trace_id} spans [{turn.start}, {turn.end}) of "
                    f"{len(self.token_ids)} tokens; spans must be non-empty, ordered and inside the sample"
                )
            if not all(math.isfinite(value) and value <= 1e-4 for value in turn.logprobs):
                raise InvalidSampleError(f"sample {self.id}: turn {turn.trace_id} has a log-probability that is none")
            if not math.isfinite(turn.reward):
                raise InvalidSampleError(f"sample {self.id}: turn {turn.trace_id} has the reward {turn.reward}")
            cursor = turn.end

    @property
    def loss_mask(self) -> tuple[int, ...]:
        """1 on sampled tokens, 0 elsewhere; length T."""
        mask = [0] * len(self.token_ids)
        for turn in self.turns:
            mask[turn.start : turn.end] = [1] * len(turn.logprobs)
        return tuple(mask)

    @property
    def reward(self) -> float:
        """Mean reward over its turns."""
        return sum(turn.reward for turn in self.turns) / len(self.turns)


@dataclass(frozen=True, slots=True)
class AdapterVersion:
    """One immutable set of LoRA weights, with its lineage."""

    agent: str
    number: int  # from 1
    base_model: str
    parent: int  # number of the version that it was trained from; 0: the base model
    trace_ids: tuple[str, ...]  # what this step was trained on
    step: int  # optimiser steps since the agent's first
    metrics: Mapping[str, float]
    sha256: str  # of adapter_model.safetensors
    libraries: Mapping[str, str]  # name -> version
    path: str  # PEFT folder on vLLM's machine
    created_at: float
    state: VersionState = VersionState.CANDIDATE

    @property
    def name(self) -> str:
        """``agent@vN``, the name under which vLLM serves it."""
        return version_name(self.agent, self.number)


def message_text(message: Message) -> str:
    """The text of a message whose content is a string, a list of parts, or absent."""
    content = message.get("content")
    if isinstance(content, str):
        return content
    if isinstance(content, list | tuple):
        parts = (part.get("text") for part in content if isinstance(part, Mapping))
        return "\n".join(text for text in parts if isinstance(text, str))
    return ""
