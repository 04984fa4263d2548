"""Settings of what learns: rewards, hooks, worker, publishing, windows, vLLM, trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator

from metaclaw_plugin.settings_section import Section, resolve_secret


class NextTurnSettings(Section):
    """The built-in reward `next_turn`: what the user said next."""

    positive: list[str] = Field(default_factory=list, description="Further words of praise, in any language.")
    negative: list[str] = Field(default_factory=list, description="Further words that correct, in any language.")


class LengthSettings(Section):
    """The built-in reward `length`."""

    max_tokens: int | None = Field(None, ge=1, description="Tokens that an answer may have; set: the reward is on.")


class VerifierSettings(Section):
    """The built-in reward `verifier`: a command or callable of the owner's."""

    command: list[str] = Field(default_factory=list, description="Command; reads the trace as JSON; set: it is on.")
    function: str | None = Field(None, description="package.module:function, instead of a command.")
    timeout: float = Field(20.0, gt=0, description="Seconds that one run may take.")
    concurrency: int = Field(4, ge=1, description="Runs at the same time.")


class JudgeSettings(Section):
    """The built-in reward `judge`: a model reads the reply and what followed."""

    model: str | None = Field(None, description="Model that judges, as the gateway names it; set: the judge is on.")
    url: str | None = Field(None, description="OpenAI-compatible root URL ending in /v1; unset: our gateway.")
    api_key: str | None = Field(None, description="Key for `url`; os.environ/NAME reads a variable.")
    rubric: str | None = Field(None, description="What a good answer is, in your words; unset: a general rubric.")
    votes: int = Field(3, ge=1, le=15, description="Times that each reply is judged; the majority counts.")
    temperature: float = Field(0.6, ge=0, le=2, description="Sampling temperature of the votes.")
    max_tokens: int = Field(512, ge=16, description="Tokens of one vote.")
    timeout: float = Field(60.0, gt=0, description="Seconds for one vote's answer.")
    retries: int = Field(3, ge=0, le=10, description="Further tries of a vote after an error or 429.")
    concurrency: int = Field(8, ge=1, le=512, description="Votes under way at the same time.")
    daily_calls: int | None = Field(2000, ge=0, description="Most calls a day (UTC); null: no limit.")
    daily_cost: float | None = Field(None, ge=0, description="Most US dollars a day (UTC); null: no limit.")
    input_price: float = Field(0.0, ge=0, description="US dollars per million input tokens, if not told.")
    output_price: float = Field(0.0, ge=0, description="US dollars per million output tokens, likewise.")

    @field_validator("api_key")
    @classmethod
    def _from_environment(cls, value: str | None) -> str | None:
        return resolve_secret(value)


class RewardSettings(Section):
    """Built-in rewards and how opinions are combined."""

    weights: dict[str, Annotated[float, Field(ge=0)]] = Field(
        default_factory=dict, description="Weight of each reward plugin by name; 0 switches it off; else 1."
    )
    per_agent: dict[str, dict[str, Annotated[float, Field(ge=0)]]] = Field(
        default_factory=dict, description="Weights for one agent alone, by agent and plugin; they go before `weights`."
    )
    next_turn: NextTurnSettings = NextTurnSettings()
    length: LengthSettings = LengthSettings()
    verifier: VerifierSettings = VerifierSettings()
    judge: JudgeSettings = JudgeSettings()
    session_credit: Literal["discounted", "undiscounted", "per_turn"] = Field(
        "discounted", description="How a reward for a whole session is spread over its turns."
    )
    session_discount: float = Field(0.9, gt=0, le=1, description="Factor for each turn back from the session's last.")


class HookSettings(Section):
    """Plugins of the owner's own."""

    path: Path | None = Field(None, description="Folder of plain .py plugin files; unset: hooks/ in METACLAW_HOME.")
    timeout: float = Field(30.0, gt=0, description="Seconds after which one hook call counts as no opinion.")
    request_timeout: float = Field(2.0, gt=0, description="The same in the gateway, where a request waits.")


class WorkerSettings(Section):
    """The process that scores, forwards and publishes."""

    poll_interval: float = Field(0.5, gt=0, description="Seconds between looks for work when there is none.")
    concurrency: int = Field(128, ge=2, le=4096, description="Traces scored at once; half of them of one agent.")
    evidence_timeout: float = Field(
        600.0, ge=0, description="Seconds after which a reply is scored without having seen what followed."
    )
    merge_wait: float = Field(
        5.0, ge=0, description="Seconds that a scored trace waits for later ones of its session to merge with."
    )
    max_sample_tokens: int = Field(8192, ge=2, description="Traces are not merged into samples longer than this.")
    strict_query: bool = Field(False, description="Set aside traces of skill generations before the newest.")
    lease: float = Field(60.0, gt=0, description="Seconds, beyond time-outs, after which a dead worker's work is free.")
    max_backoff: float = Field(30.0, gt=0, description="Most seconds between tries while the trainer is away.")


class PublishSettings(Section):
    """When a new adapter version may serve."""

    policy: Literal["always", "not_worse", "better"] = Field("not_worse", description="What a candidate must show.")
    replays: int = Field(40, ge=0, le=1000, description="Held-out prompts that candidate and serving version answer.")
    replay_max_tokens: int = Field(256, ge=1, description="Longest replayed answer, in tokens.")
    replay_concurrency: int = Field(2, ge=1, le=64, description="Replays under way at once; traffic comes first.")
    max_kl: float = Field(1.0, gt=0, description="Nats per token that a candidate may be away from the base model.")
    min_distinct: float = Field(0.8, ge=0, le=1, description="Share of the serving version's distinct-2 to be kept.")
    max_sanity_drop: float = Field(0.7, gt=0, description="Nats per token that plain answers may lose.")
    canary_share: float = Field(0.0, ge=0, lt=1, description="Share of new sessions that try a version; 0: none.")
    canary_rewards: int = Field(20, ge=2, description="Live rewards of each side that end the trial of a canary.")
    canary_hours: float = Field(24.0, gt=0, description="Hours after which a trial is decided by what there is.")
    retry_interval: float = Field(5.0, gt=0, description="Seconds before what could not be loaded is tried again.")
    refresh_interval: float = Field(30.0, gt=0, description="Seconds after which the trainer is told again.")
    tool_loop_timeout: float = Field(
        600.0, ge=0, description="Seconds without a request after which a tool loop no longer holds its version."
    )
    dead_after: float = Field(30.0, gt=1, description="Seconds of silence after which a gateway process is dead.")


class WindowSettings(Section):
    """When agents in mode auto may train: while any of these windows is open; none given: never."""

    hours: list[str] = Field(default_factory=list, description="Daily hours, such as 23:00-07:00.")
    time_zone: str | None = Field(None, description="Zone of the hours, such as Europe/Berlin; unset: this machine's.")
    idle_after: float | None = Field(None, gt=0, description="Seconds without a request that open a window.")
    idle_scope: Literal["agent", "all"] = Field("agent", description="Whose requests count: the agent's own, or all.")
    calendar: str | None = Field(None, description="Whole path or URL of an ICS file; its events are windows.")


class VllmSettings(Section):
    """The sampler: one that `metaclaw vllm` starts, or that already runs."""

    url: str = Field("http://127.0.0.1:8000", description="Root URL of vLLM, without /v1.")
    api_key: str | None = Field(
        None, description="Key that vLLM asks for (one started by us is given it); os.environ/NAME reads a variable."
    )
    managed: bool = Field(True, description="`metaclaw start` starts vLLM itself.")
    host: str = Field("127.0.0.1", description="Address that ours listens on; beyond loopback it needs api_key.")
    dtype: str = Field("auto", description="Weight type of the served model; match the trainer's.")
    max_model_len: int | None = Field(None, ge=16, description="Context length; unset: the model's own.")
    max_lora_rank: Literal[8, 16, 32, 64, 128, 256, 320, 512] = Field(
        32, description="Largest adapter rank that can be served; the trainer's rank must not be larger."
    )
    adapters: Literal["shared", "fetched"] = Field(
        "shared",
        description="shared: vLLM reads the trainer's folders; fetched: one on another machine fetches them by HTTP.",
    )
    lora_targets: list[str] = Field(
        default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        min_length=1,
        description="Modules that may carry an adapter; the trainer's targets must be among them.",
    )
    max_loras: int = Field(4, ge=1, description="Adapters that one batch may mix.")
    max_cpu_loras: int = Field(32, ge=1, description="Adapters held ready in memory.")
    kv_cache_gib: int = Field(1, ge=1, description="GiB of memory for the KV cache on a machine without a GPU.")
    cpu_cores: str | None = Field(None, description="vLLM's cores on a machine without a GPU, such as 0-1; unset: all.")
    devices: str | None = Field(None, description="GPUs for vLLM, such as 0,1; given to it when it starts.")
    gpu_memory: float | None = Field(
        None, gt=0, le=1, description="Share of GPU memory for vLLM; unset: half beside a trainer, else vLLM's default."
    )
    tensor_parallel: int = Field(1, ge=1, description="GPUs that one copy of the model is spread over.")
    tool_call_parser: str | None = Field(
        "hermes", description="vLLM's parser of the model's tool calls; null: requests with tools are refused."
    )
    start_timeout: float = Field(600.0, gt=0, description="Seconds in which vLLM must be ready.")
    extra_args: list[str] = Field(default_factory=list, description="Further arguments, passed to vLLM as they are.")

    @field_validator("api_key")
    @classmethod
    def _from_environment(cls, value: str | None) -> str | None:
        return resolve_secret(value)

    @property
    def headers(self) -> dict[str, str]:
        """What every request to vLLM carries."""
        return {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}


class RlSettings(Section):
    """Where the trainer is (the seed's names)."""

    enabled: bool = Field(True, description="False: no trainer; skills only.")
    backend: Literal["local", "remote"] = Field("local", description="local: on this machine; remote: at remote_url.")
    remote_url: str = Field("http://127.0.0.1:4010", description="Root URL of the trainer.")
    remote_api_key: str | None = Field(None, description="Bearer key of the trainer; os.environ/NAME reads a variable.")

    @property
    def headers(self) -> dict[str, str]:
        """What every request to the trainer carries."""
        return {"Authorization": f"Bearer {self.remote_api_key}"} if self.remote_api_key else {}

    @field_validator("remote_api_key")
    @classmethod
    def _from_environment(cls, value: str | None) -> str | None:
        return resolve_secret(value)
