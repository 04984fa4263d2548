"""The worker's plugins: built-in rewards as the settings say, installed packages, and the owner's folder."""

from __future__ import annotations

from collections.abc import Collection

from metaclaw_hooks.plugins import Plugins, create_plugin_manager
from metaclaw_hooks.rewards.judge import JudgeConfig, JudgeReward
from metaclaw_hooks.rewards.length import LengthReward
from metaclaw_hooks.rewards.next_turn import NextTurnReward
from metaclaw_hooks.rewards.tool_outcome import ToolOutcomeReward
from metaclaw_hooks.rewards.verifier import VerifierReward
from metaclaw_hooks.types import Message, message_text
from sqlalchemy.engine import Engine

from metaclaw_plugin.errors import ConfigError
from metaclaw_plugin.gateway.identity import internal_key
from metaclaw_plugin.settings import Settings
from metaclaw_plugin.skills.query import clean, is_human
from metaclaw_plugin.worker.judge_book import StoreJudgeBook

WORKER_HOOKS = ("score_trace", "combine_rewards", "accept_adapter", "adapter_published", "training_window")


def load_plugins(settings: Settings, engine: Engine, wanted: Collection[str] = WORKER_HOOKS) -> Plugins:
    """Load everything that the worker may call, or whatever implements one of the ``wanted`` hooks.

    Raises:
        ConfigError: if a built-in reward is set up wrongly.
    """
    builtins = built_in_rewards(settings, engine)
    return create_plugin_manager(settings.hooks_path, settings.hooks.timeout, builtins, wanted=wanted)


def built_in_rewards(settings: Settings, engine: Engine) -> dict[str, object]:
    """The built-in rewards that the settings switch on, by name.

    Raises:
        ConfigError: if one is set up wrongly.
    """
    rewards = settings.rewards
    found: dict[str, object] = {
        "next_turn": NextTurnReward(rewards.next_turn.positive, rewards.next_turn.negative, said_by_human),
        "tool_outcome": ToolOutcomeReward(),
    }
    if rewards.length.max_tokens is not None:
        found["length"] = LengthReward(rewards.length.max_tokens)
    if (verifier := _verifier(settings)) is not None:
        found["verifier"] = verifier
    if rewards.judge.model is not None:
        found["judge"] = JudgeReward(judge_config(settings), StoreJudgeBook(engine))
    return found


def said_by_human(message: Message) -> str | None:
    """What a human wrote in ``message``, without what clients and our own injection wrapped around it."""
    return (clean(message_text(message)) or None) if is_human(message) else None


def judge_config(settings: Settings) -> JudgeConfig:
    """The judge as the settings say; without a url it asks our own gateway, under the key that is never captured."""
    judge = settings.rewards.judge
    values = judge.model_dump()
    if judge.url is None:
        host = "127.0.0.1" if settings.gateway.host in ("0.0.0.0", "::", "") else settings.gateway.host
        values |= {"url": f"http://{host}:{settings.gateway.port}/v1", "api_key": internal_key(settings.home)}
    return JudgeConfig(**values)


def _verifier(settings: Settings) -> VerifierReward | None:
    own = settings.rewards.verifier
    if own.command and own.function:
        raise ConfigError("metaclaw.rewards.verifier: give a command or a function, not both")
    try:
        if own.command:
            return VerifierReward(own.command, own.timeout, own.concurrency)
        if own.function:
            return VerifierReward.of_callable(own.function, own.timeout, own.concurrency)
    except ValueError as error:
        raise ConfigError(f"metaclaw.rewards.verifier: {error}") from error
    return None
