"""The config file that `metaclaw setup` writes: commented, whole, and one that LiteLLM itself can run."""

from __future__ import annotations

import contextlib
import json
import os
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from metaclaw_plugin.errors import ConfigError
from metaclaw_plugin.settings import Settings, parse_settings

Kind = Literal["skills", "local", "server"]
KINDS: Mapping[str, str] = {
    "skills": "no GPU: skills only, in front of a model that I reach over an API",
    "local": "this machine serves and trains (a GPU, or a very small model on the CPU)",
    "server": "a GPU server elsewhere serves and trains; the gateway is here",
}
# The variable that LiteLLM's providers read their key from, for the question about it.
KEY_VARIABLES = {
    "openai": "OPENAI_API_KEY",
    "anthropic": "ANTHROPIC_API_KEY",
    "gemini": "GEMINI_API_KEY",
    "openrouter": "OPENROUTER_API_KEY",
    "deepseek": "DEEPSEEK_API_KEY",
}
GPU_MODEL = "Qwen/Qwen3-4B-Instruct-2507"
CPU_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"


@dataclass(frozen=True)
class Answers:
    """What the wizard was told."""

    kind: Kind
    home: Path
    port: int = 4000
    console_port: int = 4020
    upstream: str | None = None  # LiteLLM's name, such as anthropic/claude-sonnet-4-5 (skills)
    upstream_key_variable: str | None = None
    upstream_base: str | None = None
    base_model: str | None = None  # (local, server)
    cpu: bool = False  # (local) no GPU here
    trainer_url: str = "http://127.0.0.1:4010"
    trainer_key: str | None = None  # literal, or os.environ/NAME (server)
    vllm_url: str = "http://127.0.0.1:8000"
    vllm_key: str | None = None


def key_variable(upstream: str) -> str | None:
    """The variable in which an upstream's provider expects its key; ``None`` if we do not know it."""
    return KEY_VARIABLES.get(upstream.split("/", maxsplit=1)[0])


def config_text(answers: Answers) -> str:
    """The file's text.

    Raises:
        ConfigError: if an answer is missing, or one that cannot be.
    """
    text = "\n".join((_HEAD, _models(answers), _LITELLM.format(console=answers.console_port), _ours(answers)))
    checked(text, "the answers")
    return text


def checked(text: str, source: str) -> Settings:
    """The settings in ``text``, with secrets in variables taken as they are.

    Raises:
        ConfigError: if our section has something wrong in it.
    """
    section: dict[str, Any] = dict(yaml.safe_load(text)["metaclaw"])
    # The variable may be set only where the gateway runs; that it is there is checked then.
    for part, name in (("rl", "remote_api_key"), ("vllm", "api_key")):
        values = dict(section.get(part) or {})
        if str(values.get(name) or "").startswith("os.environ/"):
            section[part] = values | {name: "checked-when-it-runs"}
    return parse_settings(section, source)


def write_config(path: Path, text: str, replace: bool) -> Path | None:
    """Write the file in one step, readable by this user alone; returns the backup of the one that was there.

    Raises:
        ConfigError: if one is there and ``replace`` is false, or it cannot be written; nothing is changed then.
    """
    if path.exists() and not replace:
        raise ConfigError(f"{path} is there already; --force replaces it (the old one is kept beside it)")
    backup = path.with_name(path.name + ".bak") if path.exists() else None
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as file:
            file.write(text)
        if backup is not None:
            path.replace(backup)
        part.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink()
        raise ConfigError(
            f"cannot write {path}: {error.strerror}; set METACLAW_HOME to a folder that is yours"
        ) from error
    return backup


def _models(answers: Answers) -> str:
    if answers.kind == "skills":
        if not answers.upstream:
            raise ConfigError("which model shall answer? give --upstream, such as anthropic/claude-sonnet-4-5")
        parameters: dict[str, str] = {"model": answers.upstream}
        if answers.upstream_base:
            parameters["api_base"] = answers.upstream_base
        if answers.upstream_key_variable:
            parameters["api_key"] = f"os.environ/{answers.upstream_key_variable}"
        note = "every agent is answered by this model, whatever name it asks for"
    else:
        parameters = {
            "model": "hosted_vllm/*",
            "api_base": answers.vllm_url.rstrip("/") + "/v1",
            "api_key": answers.vllm_key or "none",
        }
        note = "vLLM, with the base model and every agent's adapters"
    lines = [f"model_list:\n  # {note}", '  - model_name: "metaclaw/*"', "    litellm_params:"]
    lines += [f"      {name}: {_scalar(value)}" for name, value in parameters.items()]
    if answers.kind != "skills":
        lines.append("      use_chat_completions_api: true  # /v1/responses too, so that token ids can be had")
    return "\n".join([*lines, ""])


def _ours(answers: Answers) -> str:
    lines = ["metaclaw:", f"  home: {_scalar(str(answers.home))}  # data, logs, keys, adapters"]
    if answers.kind == "skills":
        lines += ["  mode: skills_only  # off, skills_only, rl (train when a batch is full) or auto (train in windows)"]
    else:
        if not answers.base_model:
            raise ConfigError(f"which model shall learn? give --base-model: a folder or a hub name such as {GPU_MODEL}")
        lines += [
            "  mode: rl  # off, skills_only, rl (train when a batch is full) or auto (train in windows)",
            f"  base_model: {_scalar(answers.base_model)}",
        ]
    lines += ["  gateway:", f"    port: {answers.port}", "  console:", f"    port: {answers.console_port}"]
    if answers.kind == "local":
        lines += ["  vllm:", f"    url: {_scalar(answers.vllm_url)}"]
        if answers.cpu:
            lines += ["    dtype: float32  # what the trainer computes in on a CPU", "    max_model_len: 4096"]
        lines += ["  rl:", "    backend: local", f"    remote_url: {_scalar(answers.trainer_url)}"]
    elif answers.kind == "server":
        lines += ["  vllm:", f"    url: {_scalar(answers.vllm_url)}", "    managed: false  # it runs on the server"]
        lines += [f"    api_key: {_scalar(answers.vllm_key)}"] if answers.vllm_key else []
        lines += ["  rl:", "    backend: remote", f"    remote_url: {_scalar(answers.trainer_url)}"]
        lines += [f"    remote_api_key: {_scalar(answers.trainer_key)}"] if answers.trainer_key else []
    return "\n".join([*lines, ""])


def _scalar(value: str) -> str:
    """A YAML string that is read back as it was, quoted only where it must be."""
    plain = yaml.safe_load(f"x: {value}") if "\n" not in value and ": " not in value and " #" not in value else None
    return value if plain == {"x": value} else json.dumps(value)


_HEAD = textwrap.dedent("""\
    # Written by `metaclaw setup`; yours to change. LiteLLM's own sections, and ours, `metaclaw:`, which LiteLLM leaves
    # alone. All settings of ours, with what they mean: docs/configuration.md. `metaclaw doctor` checks the whole.
    """)
_LITELLM = textwrap.dedent("""\
    litellm_settings:
      callbacks: metaclaw_plugin.callback.handler  # listed once
      drop_params: false      # what a client asks for is never dropped in silence
      telemetry: false
      turn_off_message_logging: true  # loggers that you add get counts and costs, and no text
      num_retries: 0          # clients retry by themselves
      request_timeout: 600

    router_settings:
      disable_cooldowns: true # one upstream: to rest it after an error would only refuse what it can answer

    general_settings:
      custom_auth: metaclaw_plugin.gateway.auth.authenticate  # keys of `metaclaw agents add`
      plugins:  # MetaClaw's pages in LiteLLM's admin UI, at its top left; the address is the browser's way to them
        - name: metaclaw
          display_name: MetaClaw
          url: http://localhost:{console}
    """)
