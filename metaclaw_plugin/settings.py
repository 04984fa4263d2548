"""All settings of gateway and worker: the section ``metaclaw:`` of the LiteLLM config file.

``metaclaw.trainer`` is read and checked by the trainer itself, which shares no code with this package.
"""

from __future__ import annotations

import difflib
import os
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from metaclaw_hooks.types import Mode
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from metaclaw_plugin.errors import ConfigError

CONFIG_ENV = "METACLAW_CONFIG"  # path of the config file, for processes that LiteLLM starts
HOME_ENV = "METACLAW_HOME"
CONFIG_NAME = "litellm_config.yaml"  # what `metaclaw setup` writes into METACLAW_HOME


def default_home() -> Path:
    """``$METACLAW_HOME``, else ``~/.metaclaw``."""
    return Path(os.environ.get(HOME_ENV) or "~/.metaclaw").expanduser()


class Section(BaseModel):
    """Root of all sections: unknown names are refused, values never change."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class GatewaySettings(Section):
    """The LiteLLM proxy with our callback."""

    host: str = Field("127.0.0.1", description="Address to listen on; anything but loopback needs keys on every agent.")
    port: int = Field(4000, ge=1, le=65535, description="Port of the gateway.")
    workers: int = Field(1, ge=1, le=64, description="Gateway processes.")
    commit_timeout: float = Field(2.0, gt=0, description="Seconds that an answer's last byte waits for its trace.")
    max_body_bytes: int = Field(32_000_000, ge=1024, description="Longest request body; beyond it, 413.")
    max_messages: int = Field(4000, ge=1, description="Most messages in one request; beyond it, 413.")
    max_tools: int = Field(1000, ge=1, description="Most tools in one request; beyond it, 413.")


class StoreSettings(Section):
    """Where traces, agents, rewards and routes are kept."""

    url: str | None = Field(None, description="SQLAlchemy URL; unset: SQLite in METACLAW_HOME.")
    max_bytes: int | None = Field(None, ge=1, description="Stored bytes of traces beyond which no more are kept.")
    keep_days: float | None = Field(None, gt=0, description="Age at which traces are deleted; unset: never.")
    keep_bytes: int | None = Field(
        None, ge=1, description="Stored bytes of traces beyond which the oldest are deleted; unset: none are."
    )


class SessionSettings(Section):
    """How requests become conversations."""

    idle_timeout: float = Field(1800.0, gt=0, description="Seconds without a request after which a session is closed.")
    held_out_one_in: int = Field(10, ge=0, description="One session in so many is held out for replays; 0: none.")
    side_phrases: list[str] = Field(
        default_factory=list,
        description="A request whose system prompt or newest human message holds one of these is a side call.",
    )


class CaptureSettings(Section):
    """What is kept of an exchange, and when it may be trained on."""

    min_temperature: float = Field(0.5, ge=0, description="Below this sampling temperature a trace is not trainable.")
    max_temperature: float = Field(1.2, gt=0, description="Above this sampling temperature a trace is not trainable.")
    min_top_p: float = Field(0.9, gt=0, le=1, description="Below this top_p a trace is not trainable.")


class EvolutionSettings(Section):
    """New skills from failures: a model is shown them and proposes edits."""

    model: str | None = Field(None, description="Model that writes skills, named as at the gateway; set: it is on.")
    url: str | None = Field(None, description="OpenAI-compatible root URL ending in /v1; unset: our gateway.")
    api_key: str | None = Field(None, description="Key for `url`; os.environ/NAME reads a variable.")
    approval: Literal["auto", "review"] = Field(
        "auto", description="auto: valid edits apply; review: they wait for `metaclaw skills review`."
    )
    failure_reward: float = Field(0.0, ge=-1, le=1, description="A trace with a reward up to this is a failure.")
    min_failures: int = Field(3, ge=1, description="Failures after which the evolver is asked.")
    every_turns: int | None = Field(
        50, ge=1, description="It is also asked after so many scored turns with a failure among them; null: not."
    )
    at_session_end: bool = Field(True, description="It is also asked when a session with a failure in it is closed.")
    support_share: float = Field(
        0.5, gt=0, le=1, description="Share of failed sessions kept for it, and so from training, of agents that train."
    )
    max_traces: int = Field(6, ge=1, le=50, description="Failures shown in one round.")
    max_edits: int = Field(3, ge=1, le=20, description="Edits accepted in one round.")
    max_own_skills: int = Field(100, ge=1, description="Skills that an agent may have of its own.")
    max_body: int = Field(2400, ge=200, le=20_000, description="Characters of an evolved skill's body.")
    max_tokens: int = Field(3000, ge=100, description="Tokens of its answer.")
    timeout: float = Field(120.0, gt=0, description="Seconds for its answer.")
    retire_uses: int | None = Field(
        20, ge=5, description="Sessions with, and without, an own skill before one that hurts is retired; null: never."
    )

    @field_validator("api_key")
    @classmethod
    def _from_environment(cls, value: str | None) -> str | None:
        return resolve_secret(value)


class SkillSettings(Section):
    """Skill library, retrieval and injection."""

    path: Path | None = Field(None, description="Folder of skills; unset: skills/ in METACLAW_HOME.")
    starter: bool = Field(True, description="Fill an empty library with the starter set.")
    max_skills: int = Field(3, ge=0, le=20, description="Most skills injected for one message.")
    max_tokens: int = Field(1500, ge=0, description="Most tokens, about, that the skills for one message may cost.")
    min_relevance: float | None = Field(
        None, ge=0, description="Below this relevance a skill is not injected; unset: what measured best."
    )
    retrieval: Literal["lexical", "embeddings", "fused"] = Field("lexical", description="How relevance is measured.")
    embedder: Literal["model2vec", "onnx", "endpoint"] | None = Field(None, description="What makes sentence vectors.")
    embedder_model: str | None = Field(None, description="Folder of the embedder's model, or its name at the endpoint.")
    embedder_url: str | None = Field(None, description="Root URL of an embeddings endpoint, with /v1.")
    embedder_api_key: str | None = Field(None, description="Its key; os.environ/NAME reads a variable.")
    embedder_timeout: float = Field(1.0, gt=0, description="Seconds after which a selection goes on without vectors.")
    reload_interval: float = Field(1.0, gt=0, description="Seconds between looks for edited skill files.")
    withheld_share: float = Field(
        0.05, ge=0, le=0.5, description="Share of sessions that go without a given skill, to measure it; 0: none."
    )

    evolution: EvolutionSettings = EvolutionSettings()

    @field_validator("embedder_api_key")
    @classmethod
    def _from_environment(cls, value: str | None) -> str | None:
        return resolve_secret(value)


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


class WorkerSettings(Section):
    """The process that scores, forwards and publishes."""

    poll_interval: float = Field(0.5, gt=0, description="Seconds between looks for work when there is none.")
    concurrency: int = Field(64, ge=1, le=4096, description="Traces scored at the same time.")
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
    calendar: str | None = Field(None, description="ICS file or URL; its events are windows.")


class VllmSettings(Section):
    """The sampler: one that `metaclaw vllm` starts, or that already runs."""

    url: str = Field("http://127.0.0.1:8000", description="Root URL of vLLM, without /v1.")
    managed: bool = Field(True, description="`metaclaw start` starts vLLM itself.")
    host: str = Field("127.0.0.1", description="Address that a vLLM started by us listens on.")
    dtype: str = Field("auto", description="Weight type of the served model; match the trainer's.")
    max_model_len: int | None = Field(None, ge=16, description="Context length; unset: the model's own.")
    max_lora_rank: Literal[8, 16, 32, 64, 128, 256, 320, 512] = Field(
        32, description="Largest adapter rank that can be served; the trainer's rank must not be larger."
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
    tensor_parallel: int = Field(1, ge=1, description="GPUs that one copy of the model is spread over.")
    tool_call_parser: str | None = Field(
        "hermes", description="vLLM's parser of the model's tool calls; null: requests with tools are refused."
    )
    start_timeout: float = Field(600.0, gt=0, description="Seconds in which vLLM must be ready.")
    extra_args: list[str] = Field(default_factory=list, description="Further arguments, passed to vLLM as they are.")


class RlSettings(Section):
    """Where the trainer is (the seed's names)."""

    enabled: bool = Field(True, description="False: no trainer; skills only.")
    backend: Literal["local", "remote"] = Field("local", description="local: on this machine; remote: at remote_url.")
    remote_url: str = Field("http://127.0.0.1:4010", description="Root URL of the trainer.")
    remote_api_key: str | None = Field(None, description="Bearer key of the trainer; os.environ/NAME reads a variable.")

    @field_validator("remote_api_key")
    @classmethod
    def _from_environment(cls, value: str | None) -> str | None:
        return resolve_secret(value)


class Settings(Section):
    """The section ``metaclaw:`` of the config file."""

    home: Path = Field(default_factory=default_home, description="Where data is kept; METACLAW_HOME, else ~/.metaclaw.")
    mode: Mode = Field(Mode.RL, description="Mode of agents that set none: off, skills_only, rl or auto.")
    base_model: str | None = Field(None, description="Folder or hub name of the model that is served and adapted.")
    gateway: GatewaySettings = GatewaySettings()
    store: StoreSettings = StoreSettings()
    sessions: SessionSettings = SessionSettings()
    capture: CaptureSettings = CaptureSettings()
    skills: SkillSettings = SkillSettings()
    rewards: RewardSettings = RewardSettings()
    hooks: HookSettings = HookSettings()
    worker: WorkerSettings = WorkerSettings()
    publish: PublishSettings = PublishSettings()
    windows: WindowSettings = WindowSettings()
    vllm: VllmSettings = VllmSettings()
    rl: RlSettings = RlSettings()
    trainer: dict[str, Any] = Field(default_factory=dict, description="Settings of the trainer; see its own reference.")

    @field_validator("home")
    @classmethod
    def _expand(cls, value: Path) -> Path:
        return value.expanduser().absolute()

    @property
    def store_url(self) -> str:
        return self.store.url or f"sqlite:///{self.home / 'metaclaw.db'}"

    @property
    def skills_path(self) -> Path:
        return (self.skills.path or self.home / "skills").expanduser()

    @property
    def hooks_path(self) -> Path:
        return (self.hooks.path or self.home / "hooks").expanduser()


def resolve_secret(value: str | None) -> str | None:
    """``os.environ/NAME`` -> the variable's value, as LiteLLM writes it; anything else as it is.

    Raises:
        ValueError: if the variable is not set.
    """
    if value is None or not value.startswith("os.environ/"):
        return value
    name = value.removeprefix("os.environ/")
    if name not in os.environ:
        raise ValueError(f"the environment variable {name} is not set")
    return os.environ[name]


def find_config(path: Path | None = None) -> Path | None:
    """The config file that is meant: ``path``, else ``$METACLAW_CONFIG``, else the one in METACLAW_HOME, if there."""
    if path is not None:
        return path.expanduser()
    if os.environ.get(CONFIG_ENV):
        return Path(os.environ[CONFIG_ENV])
    at_home = default_home() / CONFIG_NAME
    return at_home if at_home.is_file() else None


def load_settings(path: Path | None = None) -> Settings:
    """Read the section ``metaclaw:`` of the file that ``find_config`` names (none: all defaults).

    Raises:
        ConfigError: if the file cannot be read, or a setting is unknown or of the wrong type.
    """
    path = find_config(path)
    if path is None:
        return Settings()
    return parse_settings(read_config(path).get("metaclaw") or {}, str(path))


def read_config(path: Path) -> dict[str, Any]:
    """The whole config file as a mapping.

    Raises:
        ConfigError: if it is missing, unreadable, or no YAML mapping.
    """
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the config file {path}: {error.strerror}; name it with --config") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text: {error}") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}, line {mark.line + 1}, column {mark.column + 1}" if mark else str(path)
        raise ConfigError(f"{where}: not valid YAML: {getattr(error, 'problem', error)}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path} holds no YAML mapping; start from litellm_config.yaml")
    return data


def parse_settings(data: Any, source: str) -> Settings:
    """Validate the section; ``source`` is named in errors.

    Raises:
        ConfigError: one line for each wrong setting, with the nearest right name for an unknown one.
    """
    try:
        return Settings.model_validate(data)
    except ValidationError as error:
        lines = [_explain(item["loc"], item["type"], item["msg"]) for item in error.errors()]
        raise ConfigError(f"{source}: " + "; ".join(lines)) from error


def _explain(location: tuple[int | str, ...], kind: str, message: str) -> str:
    name = ".".join(str(part) for part in ("metaclaw", *location))
    if kind != "extra_forbidden":
        return f"setting {name}: {message}"
    section: type[BaseModel] = Settings
    for part in location[:-1]:
        inner = section.model_fields[str(part)].annotation
        if not (isinstance(inner, type) and issubclass(inner, BaseModel)):
            return f"unknown setting {name}"
        section = inner
    near = difflib.get_close_matches(str(location[-1]), section.model_fields, n=1)
    hint = f"; did you mean {near[0]}?" if near else f"; known here: {', '.join(section.model_fields)}"
    return f"unknown setting {name}{hint}"
