"""All settings of the trainer: ``metaclaw.trainer`` of the config file, with shared defaults from ``metaclaw``.

``base_model``, ``home`` and the URL of vLLM are taken from ``metaclaw`` when ``metaclaw.trainer`` does not set them, so
that a machine that runs everything says them once.
"""

from __future__ import annotations

import difflib
import os
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from metaclaw_trainer.errors import SettingsError

CONFIG_ENV = "METACLAW_CONFIG"
HOME_ENV = "METACLAW_HOME"
SEVEN_PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class TrainerSettings(BaseModel):
    """The section ``metaclaw.trainer``: unknown names are refused, values never change."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    # where
    home: Path = Field(
        default_factory=lambda: Path(os.environ.get(HOME_ENV) or "~/.metaclaw"),
        description="Where data is kept; the trainer's lies in trainer/ below it. From metaclaw.home.",
    )
    host: str = Field("127.0.0.1", description="Address to listen on; anything but loopback needs API keys.")
    port: int = Field(4010, ge=0, le=65535, description="Port of the trainer; 0: any free one.")
    devices: str | None = Field(None, description="GPUs for this process, such as 0,1; given to it when it starts.")
    store: str | None = Field(None, description="SQLAlchemy URL of the queue; unset: SQLite in METACLAW_HOME/trainer.")
    api_keys_file: Path | None = Field(
        None, description="File of hashed keys; unset: keys.json in METACLAW_HOME/trainer."
    )
    vllm_urls: list[str] = Field(
        default_factory=lambda: ["http://127.0.0.1:8000"],
        description="Root URLs of all vLLM replicas that serve the adapters, without /v1. From metaclaw.vllm.url.",
    )
    vllm_api_key: str | None = Field(None, description="Bearer key of vLLM; os.environ/NAME reads a variable.")

    # the model
    base_model: str = Field("", description="Folder or hub name of the frozen base model. From metaclaw.base_model.")
    trust_remote_code: bool = Field(False, description="Run code that comes with the base model.")
    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="auto, cpu, cuda or cuda:N.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Weight type of the base model; auto: float32 on a CPU, bfloat16 on a GPU."
    )
    torch_threads: int | None = Field(None, ge=1, description="CPU threads of one operation; unset: torch decides.")
    nice: int = Field(10, ge=0, le=19, description="Priority of the training thread: 0 normal, 19 lowest.")
    max_hot_adapters: int = Field(64, ge=1, description="Agents whose adapters stay in the model at once.")
    gradient_checkpointing: bool | Literal["auto"] = Field(
        "auto",
        description="Recompute activations in the backward pass; auto: for sequences above checkpoint_above_tokens.",
    )
    checkpoint_above_tokens: int = Field(4096, ge=1, description="Length from which auto recomputes activations.")

    # adapters
    rank: int = Field(16, ge=1, le=512, description="Rank of new adapters; vLLM's max_lora_rank must not be lower.")
    alpha: float = Field(32.0, gt=0, description="LoRA alpha of new adapters; the update is scaled by alpha / rank.")
    targets: list[str] = Field(
        default_factory=lambda: list(SEVEN_PROJECTIONS),
        min_length=1,
        description="Modules that get an adapter.",
    )
    seed: int = Field(0, ge=0, description="Seed of new adapters and of the order of samples.")

    # the optimiser (AdamW)
    learning_rate: float = Field(1e-4, gt=0, le=1, description="Step size of AdamW.")
    betas: tuple[float, float] = Field((0.9, 0.95), description="Decay of AdamW's first and second moment.")
    eps: float = Field(1e-8, gt=0, description="AdamW's epsilon.")
    weight_decay: float = Field(0.0, ge=0, le=1, description="AdamW's decoupled weight decay.")
    grad_clip: float = Field(1.0, gt=0, description="Largest L2 norm of an adapter's gradient.")
    warmup_steps: int = Field(0, ge=0, description="Steps over which the step size of a new agent rises linearly.")

    # the batch
    batch_size: int = Field(16, ge=1, le=4096, description="Samples of one agent that make a new adapter version.")
    minibatches: int = Field(1, ge=1, le=64, description="Optimiser steps that one pass over a batch is divided into.")
    epochs: int = Field(1, ge=1, le=16, description="Passes over a batch.")
    micro_batch_tokens: int = Field(
        1024, ge=1, description="Tokens, padding included, of one forward pass over several samples."
    )
    padding_limit: int | None = Field(
        None, ge=0, description="Tokens by which a sample is padded in it, at most; unset: 32 on a CPU, 256 on a GPU."
    )
    max_sample_tokens: int = Field(32768, ge=2, description="Longest sample that is accepted.")
    max_staleness: int = Field(8, ge=0, description="Adapter versions that a sample may be behind the head.")
    max_queued: int = Field(10_000, ge=1, description="Samples of one agent that may wait; more are refused with 429.")
    lease_seconds: float = Field(
        900.0, gt=0, description="Seconds after which a claimed batch that nobody finished is free again."
    )
    poll_interval: float = Field(0.5, gt=0, description="Seconds between looks into the queue when there is no work.")
    max_sessions: int = Field(64, ge=1, description="Training sessions of the fork's wire that may be open at once.")
    session_idle_seconds: float = Field(
        86_400.0, gt=0, description="Seconds without a request after which such a session may be closed."
    )
    max_body_mib: int = Field(64, ge=1, le=4096, description="Largest request body, in MiB.")

    # the loss
    loss: str = Field(
        "importance_sampling", description="importance_sampling, ppo, cispo, cross_entropy, or a plugin's."
    )
    ppo_clip: tuple[float, float] = Field((0.8, 1.2), description="Bounds of the probability ratio in ppo.")
    cispo_clip: tuple[float, float] = Field((0.0, 4.0), description="Bounds of the weight in cispo.")
    importance_cap: float = Field(4.0, ge=1, description="Largest importance weight of a token in importance_sampling.")
    normalisation: Literal["token", "sequence", "constant"] = Field(
        "token",
        description="What the sum over tokens is divided by: sampled tokens of the batch; each sample's own, then "
        "samples; or normalisation_constant.",
    )
    normalisation_constant: float = Field(1.0, gt=0, description="Divisor of the loss with normalisation: constant.")
    kl_coefficient: float = Field(
        0.1, ge=0, description="Weight of the KL to the base model in the advantage; 0: none."
    )
    gap_threshold: float = Field(
        0.3,
        gt=0,
        description="Mean |log-prob of sampler - of trainer| per token, in nats, above which a sample is set aside.",
    )

    # advantages
    advantage: Literal["running", "group", "batch", "raw"] = Field(
        "running",
        description="Estimator: running baseline of the agent, same prompt, whole batch, or the reward itself.",
    )
    advantage_scale: Literal["none", "std"] = Field("none", description="std: divide by the spread of rewards.")
    baseline_memory: float = Field(32.0, gt=0, description="Rewards that the running baseline remembers, at most.")
    baseline_prior: float = Field(
        1.0, ge=0, description="Weight, in rewards, of the prior mean 0 that few samples shrink to."
    )

    # distillation
    teacher_url: str | None = Field(
        None, description="Root URL of a vLLM that serves a teacher with the same vocabulary."
    )
    teacher_model: str | None = Field(None, description="Name of the teacher there.")
    teacher_coefficient: float = Field(
        0.0, ge=0, description="Weight of the reverse KL to the teacher in the advantage."
    )
    hint_coefficient: float = Field(
        0.0, ge=0, description="Weight of the pull to the model's own answer given the hint."
    )

    # files
    disk_budget_gib: float = Field(
        20.0, gt=0, description="Space for adapter versions and checkpoints of sessions; the oldest unneeded go first."
    )
    keep_settled_days: float = Field(
        90.0, ge=1, description="Days for which a sample that was trained or set aside is known when it comes again."
    )
    hooks_path: Path | None = Field(None, description="Folder of plain .py plugins; unset: hooks/ in METACLAW_HOME.")
    hook_timeout: float = Field(30.0, gt=0, description="Seconds after which one hook call counts as no opinion.")

    @field_validator("home")
    @classmethod
    def _expand(cls, value: Path) -> Path:
        return value.expanduser().absolute()

    @field_validator("vllm_api_key")
    @classmethod
    def _from_environment(cls, value: str | None) -> str | None:
        if value is None or not value.startswith("os.environ/"):
            return value
        name = value.removeprefix("os.environ/")
        if name not in os.environ:
            raise ValueError(f"the environment variable {name} is not set")
        return os.environ[name]

    @field_validator("betas")
    @classmethod
    def _fractions(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in value):
            raise ValueError("both must be in [0, 1)")
        return value

    @field_validator("ppo_clip", "cispo_clip")
    @classmethod
    def _ordered(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not 0 <= value[0] < value[1]:
            raise ValueError("must be two numbers, the first at least 0 and below the second")
        return value

    @model_validator(mode="after")
    def _teacher_is_whole(self) -> TrainerSettings:
        if self.teacher_coefficient > 0 and not (self.teacher_url and self.teacher_model):
            raise ValueError("teacher_coefficient needs teacher_url and teacher_model")
        return self

    @property
    def folder(self) -> Path:
        """Everything that the trainer writes lies below."""
        return self.home / "trainer"

    @property
    def store_url(self) -> str:
        return self.store or f"sqlite:///{self.folder / 'queue.db'}"

    @property
    def keys_file(self) -> Path:
        return (self.api_keys_file or self.folder / "keys.json").expanduser()

    @property
    def plugins_path(self) -> Path:
        return (self.hooks_path or self.home / "hooks").expanduser()


def load_settings(path: Path | None = None) -> TrainerSettings:
    """Read ``path`` (else ``$METACLAW_CONFIG``; neither: all defaults).

    Raises:
        SettingsError: if the file cannot be read, or a setting is unknown or of the wrong type.
    """
    if path is None and os.environ.get(CONFIG_ENV):
        path = Path(os.environ[CONFIG_ENV])
    if path is None:
        return parse_settings({}, "defaults")
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError(
            f"cannot read the config file {path}: {error.strerror}; give its path with --config"
        ) from error
    except UnicodeDecodeError as error:
        raise SettingsError(f"{path} is not UTF-8 text: {error}") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}, line {mark.line + 1}, column {mark.column + 1}" if mark else str(path)
        raise SettingsError(f"{where}: not valid YAML: {getattr(error, 'problem', error)}") from error
    if not isinstance(data, dict):
        raise SettingsError(f"{path} holds no YAML mapping; start from litellm_config.yaml")
    return parse_settings(data.get("metaclaw") or {}, str(path))


def parse_settings(section: Any, source: str) -> TrainerSettings:
    """Validate the section ``metaclaw``; only its own part of it is checked. ``source`` is named in errors.

    Raises:
        SettingsError: one line for each wrong setting, with the nearest right name for an unknown one.
    """
    own = section.get("trainer") if isinstance(section, dict) else None
    if not isinstance(section, dict) or not isinstance(own or {}, dict):
        raise SettingsError(f"{source}: metaclaw and metaclaw.trainer must be mappings")
    values: dict[str, Any] = dict(own or {})
    shared: dict[str, Any] = {"base_model": section.get("base_model"), "home": section.get("home")}
    vllm, hooks = section.get("vllm"), section.get("hooks")
    if isinstance(vllm, dict) and vllm.get("url"):
        shared["vllm_urls"] = [vllm["url"]]
    if isinstance(vllm, dict):
        shared["vllm_api_key"] = vllm.get("api_key")
    if isinstance(hooks, dict):
        shared |= {"hooks_path": hooks.get("path"), "hook_timeout": hooks.get("timeout")}
    for name, value in shared.items():
        if value is not None:
            values.setdefault(name, value)
    try:
        return TrainerSettings.model_validate(values)
    except ValidationError as error:
        lines = [_explain(item["loc"], item["type"], item["msg"]) for item in error.errors()]
        raise SettingsError(f"{source}: " + "; ".join(lines)) from error


def _explain(location: tuple[int | str, ...], kind: str, message: str) -> str:
    name = ".".join(str(part) for part in ("metaclaw", "trainer", *location))
    if kind != "extra_forbidden":
        return f"setting {name}: {message}"
    near = difflib.get_close_matches(str(location[-1]), TrainerSettings.model_fields, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"unknown setting {name}{hint}"
