"""Bodies that worker and trainer exchange over HTTP. Unknown fields are refused.

worker ── POST /v1/samples ─────────────► trainer     samples, at least once, idempotent by id
worker ── POST /v1/samples/recall ──────► trainer     forget traces (deleted by their owner)
worker ── POST /v1/samples/rewards ─────► trainer     rewards that changed since (late feedback)
worker ── PUT  /v1/agents/{agent} ──────► trainer     may it train now, and how
worker ◄─ GET  /v1/agents ───────────── trainer      queue, step, why nothing is training
worker ◄─ GET  /v1/versions?after=… ─── trainer      new versions, in order
metaclaw hooks list ◄─ GET /v1/hooks ─── trainer     plugins of its process, and what they did
worker ── PUT  /v1/served ──────────────► trainer     the set of versions that vLLM shall hold
anyone ◄─ GET  /v1/adapters/{name}/{file}  trainer    the files of a version, where no disk is shared
worker ── POST /v1/agents/{agent}/head ─► trainer     a candidate was rejected: go back
worker ── POST /v1/agents/{agent}/train ► trainer     take a step now with what is queued
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from metaclaw_hooks.types import AdapterVersion, Sample, SampleTurn, VersionState

ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_FILES = ("adapter_config.json", ADAPTER_WEIGHTS)  # what PEFT and vLLM load, in a version's folder
SHA256_HEADER = "x-sha256"  # of an adapter's file, in hexadecimal
# A vLLM without the trainer's disk keeps what it fetched at .../metaclaw-mirror/<the path on the trainer's machine>.
ADAPTER_MIRROR = "metaclaw-mirror"

AgentName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")]
TokenId = Annotated[int, Field(ge=0, strict=True)]
LogProb = Annotated[float, Field(le=1e-4, allow_inf_nan=False)]


class Wire(BaseModel):
    """Root of all bodies."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class TurnBody(Wire):
    trace_id: str = Field(min_length=1, max_length=200)
    start: int = Field(ge=1)
    logprobs: list[LogProb] = Field(min_length=1)
    reward: float = Field(ge=-1.0, le=1.0, allow_inf_nan=False)


class SampleBody(Wire):
    """A ``Sample`` on the wire."""

    id: str = Field(min_length=1, max_length=200)
    agent: AgentName
    session: str = Field(max_length=400)
    token_ids: list[TokenId] = Field(min_length=2)
    turns: list[TurnBody] = Field(min_length=1)
    adapter_version: int = Field(ge=0)
    skill_generation: int = Field(ge=0)
    hint: str | None = None

    @classmethod
    def of(cls, sample: Sample) -> SampleBody:
        return cls(
            id=sample.id,
            agent=sample.agent,
            session=sample.session,
            token_ids=list(sample.token_ids),
            turns=[
                TurnBody(trace_id=t.trace_id, start=t.start, logprobs=list(t.logprobs), reward=t.reward)
                for t in sample.turns
            ],
            adapter_version=sample.adapter_version,
            skill_generation=sample.skill_generation,
            hint=sample.hint,
        )

    def sample(self) -> Sample:
        """The frozen form.

        Raises:
            InvalidSampleError: if spans and tokens do not fit together.
        """
        return Sample(
            id=self.id,
            agent=self.agent,
            session=self.session,
            token_ids=tuple(self.token_ids),
            turns=tuple(SampleTurn(t.trace_id, t.start, tuple(t.logprobs), t.reward) for t in self.turns),
            adapter_version=self.adapter_version,
            skill_generation=self.skill_generation,
            hint=self.hint,
        )


class SamplesRequest(Wire):
    samples: list[SampleBody] = Field(min_length=1, max_length=512)


class Refusal(Wire):
    id: str
    reason: str


class SamplesReply(Wire):
    """Every sample sent is in exactly one of the three lists."""

    accepted: list[str]
    duplicate: list[str]
    refused: list[Refusal]  # final: sending it again changes nothing


class RecallRequest(Wire):
    trace_ids: list[str] = Field(min_length=1, max_length=10_000)


class RecallReply(Wire):
    removed: list[str]  # ids of samples taken out of the queue
    trained_into: list[str]  # names of versions that had already learned from them


class RewardChange(Wire):
    trace_id: str = Field(min_length=1, max_length=200)
    reward: float = Field(ge=-1.0, le=1.0, allow_inf_nan=False)


class RewardsRequest(Wire):
    rewards: list[RewardChange] = Field(min_length=1, max_length=10_000)


class RewardsReply(Wire):
    """Ids of traces; one in neither list is trained already, or was never queued."""

    changed: list[str]  # will be trained with the new reward
    in_training: list[str]  # in the batch of a step that is running: ask again, should that step fail


class AgentTraining(Wire):
    """What the worker sets for one agent; ``None`` keeps what is set."""

    allowed: bool | None = None  # may train now (mode and windows)
    # Seconds from receipt that ``allowed`` holds unless it is said again, for a window that must end though nobody is
    # there to shut it; ``None``: until it is said otherwise.
    allowed_for: float | None = Field(default=None, gt=0, le=3600)
    batch_size: int | None = Field(default=None, ge=1, le=4096)  # samples a step

    @model_validator(mode="after")
    def _ends_what_is_allowed(self) -> Self:
        if self.allowed_for is not None and not self.allowed:
            raise ValueError("allowed_for says how long a permission holds; send it with allowed: true")
        return self


class AgentStatus(Wire):
    agent: AgentName
    allowed: bool  # may train now
    allowed_for: float | None  # seconds that this holds from now on; None: until the worker says otherwise
    queued: int  # samples waiting
    batch_size: int
    set_aside: int  # samples that will not be trained, with reasons in the trainer's store
    trained: int  # samples trained on
    step: int
    head: int  # version number that the next step starts from
    newest: int  # newest version number
    training: bool  # a step is running
    idle_reason: str | None  # one line: why nothing is training
    metrics: dict[str, float]  # of the last step


class AgentsReply(Wire):
    agents: list[AgentStatus]


class VersionBody(Wire):
    """An ``AdapterVersion`` on the wire: its manifest."""

    agent: AgentName
    number: int = Field(ge=1)
    base_model: str
    parent: int = Field(ge=0)
    trace_ids: list[str]
    step: int = Field(ge=0)
    metrics: dict[str, float]
    sha256: str
    libraries: dict[str, str]
    path: str
    created_at: float
    cursor: int = Field(default=0, ge=0)  # position in the trainer's list of versions

    def version(self, state: VersionState = VersionState.CANDIDATE) -> AdapterVersion:
        return AdapterVersion(
            agent=self.agent,
            number=self.number,
            base_model=self.base_model,
            parent=self.parent,
            trace_ids=tuple(self.trace_ids),
            step=self.step,
            metrics=self.metrics,
            sha256=self.sha256,
            libraries=self.libraries,
            path=self.path,
            created_at=self.created_at,
            state=state,
        )


class VersionsReply(Wire):
    versions: list[VersionBody]  # ascending by cursor


class ServedRequest(Wire):
    versions: list[str] = Field(max_length=10_000)  # agent@vN, the whole set
    keep: list[str] = Field(default_factory=list, max_length=10_000)  # not to be loaded, but their files stay


class ServedReply(Wire):
    held: list[str]  # loaded in every configured vLLM
    failed: list[Refusal]


class HeadRequest(Wire):
    version: int = Field(ge=0)  # train on from here; 0: from the base model


class TrainReply(Wire):
    started: bool
    reason: str | None = None


class HookFigures(Wire):
    """What one hook of one plugin did in a process."""

    plugin: str
    origin: str  # "package ..." or the path of a file
    agent: str | None  # the only one that it is called for
    hook: str
    calls: int
    failures: int
    seconds: float


class HooksReply(Wire):
    hooks: list[HookFigures]
    problems: dict[str, str]  # what could not be loaded, and why


class HealthReply(Wire):
    status: Literal["ok"]
    base_model: str
    device: str
    versions: dict[str, str]  # library -> version
