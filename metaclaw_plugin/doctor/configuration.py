"""The configuration: LiteLLM's part agrees with ours, and the model is one that both sides can take."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from metaclaw_plugin.doctor.finding import Finding, failure, ok, warning
from metaclaw_plugin.errors import ConfigError
from metaclaw_plugin.launch import check_model
from metaclaw_plugin.settings import Settings, read_config
from metaclaw_plugin.supervisor.plan import trains

CALLBACK = "metaclaw_plugin.callback.handler"
AUTH = "metaclaw_plugin.gateway.auth.authenticate"
DEFAULT_RANK = 16  # the trainer's, when metaclaw.trainer.rank is not set


def look_at_configuration(settings: Settings, config: Path | None) -> Iterator[Finding]:
    if config is None:
        yield failure("config file", "none", "metaclaw setup writes one")
        return
    data = read_config(config)
    yield ok("config file", str(config))
    yield _callback(data)
    yield _auth(data)
    yield _deployment(data, settings)
    if trains(settings):
        yield from _model(settings)
        yield _rank(settings)


def _callback(data: dict[str, Any]) -> Finding:
    listed = (data.get("litellm_settings") or {}).get("callbacks") or []
    listed = [listed] if isinstance(listed, str) else list(listed)
    times = listed.count(CALLBACK)
    if times == 1:
        return ok("callback", "listed once")
    if times == 0:
        return failure("callback", "not listed: nothing is captured", f"litellm_settings.callbacks: {CALLBACK}")
    return failure("callback", f"listed {times} times: everything happens as often", "list it once")


def litellm_has_the_keys(data: dict[str, Any]) -> bool:
    """Whether LiteLLM itself checks keys, by the config file ``data`` and the environment."""
    general = data.get("general_settings") or {}
    named = general.get("database_url") or general.get("master_key") or os.environ.get("DATABASE_URL")
    return general.get("custom_auth") != AUTH and bool(named)


def _auth(data: dict[str, Any]) -> Finding:
    if (data.get("general_settings") or {}).get("custom_auth") == AUTH:
        return ok("keys", "our own (`metaclaw agents add`)")
    if litellm_has_the_keys(data):
        return ok("keys", "LiteLLM's virtual keys")
    return failure("keys", "the gateway would answer anybody", f"general_settings.custom_auth: {AUTH}")


def _deployment(data: dict[str, Any], settings: Settings) -> Finding:
    remedy = "compare model_list with the one in litellm_config.yaml"
    models = [item for item in data.get("model_list") or [] if isinstance(item, dict)]
    ours = next((item for item in models if item.get("model_name") == "metaclaw/*"), None)
    if ours is None:
        return failure("model_list", 'no deployment named "metaclaw/*": agents cannot be answered', remedy)
    parameters = ours.get("litellm_params") or {}
    if not trains(settings):
        return ok("model_list", f"agents are answered by {parameters.get('model')}")
    if parameters.get("model") != "hosted_vllm/*":
        return failure("model_list", f"metaclaw/* goes to {parameters.get('model')}, which serves no adapters", remedy)
    expected = settings.vllm.url.rstrip("/") + "/v1"
    if str(parameters.get("api_base", "")).rstrip("/") != expected:
        return failure(
            "model_list",
            f"metaclaw/* goes to {parameters.get('api_base')}, metaclaw.vllm.url is {settings.vllm.url}",
            f"set its api_base to {expected}",
        )
    if not parameters.get("use_chat_completions_api"):
        return warning("model_list", "/v1/responses will not be trained on", "set use_chat_completions_api: true")
    return ok("model_list", f"metaclaw/* goes to {expected}")


def _model(settings: Settings) -> Iterator[Finding]:
    if settings.rl.backend == "remote" and not settings.base_model:
        yield ok("base model", "chosen on the server")
        return
    try:
        model = check_model(settings.base_model)
    except ConfigError as error:
        if settings.rl.backend == "local":
            yield failure("base model", str(error), "set metaclaw.base_model")
        else:
            yield ok("base model", f"{settings.base_model}, on the server")
        return
    folder = Path(model)
    if not folder.is_dir():
        yield ok("base model", f"{model} (fetched from the hub at the first start)")
        return
    yield ok("base model", model)
    if not _has_template(folder):
        yield failure("chat template", f"{model} has none", "take an instruct model")


def _has_template(folder: Path) -> bool:
    if (folder / "chat_template.jinja").is_file() or (folder / "chat_template.json").is_file():
        return True
    described = folder / "tokenizer_config.json"
    return described.is_file() and bool(json.loads(described.read_text(encoding="utf-8")).get("chat_template"))


def _rank(settings: Settings) -> Finding:
    rank = settings.trainer.get("rank", DEFAULT_RANK)
    served = settings.vllm.max_lora_rank
    if isinstance(rank, int) and rank > served:
        return failure(
            "adapter rank",
            f"the trainer makes rank {rank}, vLLM serves up to {served}",
            f"metaclaw.vllm.max_lora_rank: {rank}",
        )
    return ok("adapter rank", f"{rank}, vLLM serves up to {served}")
