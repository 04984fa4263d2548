"""What each hook may return. Anything else is that plugin's failure and counts as no opinion."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from metaclaw_hooks.errors import HookFailedError, InvalidRewardError
from metaclaw_hooks.types import Reward, SkillRef, Trace


def check_result(hook: str, plugin: str, kwargs: Mapping[str, Any], value: Any) -> Any:
    """The value in the form that callers of ``hook`` expect; a float of ``score_trace`` becomes a ``Reward``.

    Raises:
        HookFailedError: if the hook may not return such a value; the message says what it may.
    """
    if value is None:
        return None
    check = _CHECKS.get(hook)
    return check(plugin, kwargs, value) if check else value


def _reward(plugin: str, _kwargs: Mapping[str, Any], value: Any) -> Reward:
    if isinstance(value, Reward):
        return value if value.source == plugin else dataclasses.replace(value, source=plugin)
    if not _is_number(value):
        raise HookFailedError(f"score_trace returned {_short(value)}; it may return a number, a Reward or None")
    try:
        return Reward(source=plugin, value=float(value))
    except InvalidRewardError as error:
        raise HookFailedError(str(error)) from error


def _combined(_plugin: str, _kwargs: Mapping[str, Any], value: Any) -> float:
    if not _is_number(value) or not math.isfinite(value) or not -1.0 <= value <= 1.0:
        raise HookFailedError(f"combine_rewards returned {_short(value)}; it may return a number in [-1, 1] or None")
    return float(value)


def _verdict(_plugin: str, _kwargs: Mapping[str, Any], value: Any) -> bool:
    if not isinstance(value, bool):
        raise HookFailedError(f"returned {_short(value)}; it may return True, False or None")
    return value


def _same_trace(_plugin: str, kwargs: Mapping[str, Any], value: Any) -> Trace:
    if not isinstance(value, Trace):
        raise HookFailedError(f"redact_trace returned {_short(value)}; it may return a Trace or None")
    given: Trace = kwargs["trace"]
    if (value.id, value.agent, value.session) != (given.id, given.agent, given.session):
        raise HookFailedError(f"redact_trace returned another trace than {given.id}; id, agent and session must stay")
    return value


def _skills(_plugin: str, _kwargs: Mapping[str, Any], value: Any) -> Sequence[SkillRef]:
    if isinstance(value, str) or not isinstance(value, Sequence) or not all(isinstance(v, SkillRef) for v in value):
        raise HookFailedError(f"select_skills returned {_short(value)}; it may return a list of SkillRef or None")
    return value


def _advantages(_plugin: str, kwargs: Mapping[str, Any], value: Any) -> Sequence[Sequence[float]]:
    expected = [len(sample.turns) for sample in kwargs["batch"]]
    rows = [list(row) for row in value]
    if [len(row) for row in rows] != expected:
        raise HookFailedError(
            f"compute_advantages returned rows of {[len(row) for row in rows]} numbers for samples of {expected} turns"
        )
    if not all(_is_number(number) and math.isfinite(number) for row in rows for number in row):
        raise HookFailedError("compute_advantages returned something that is not a finite number")
    return rows


def _losses(_plugin: str, _kwargs: Mapping[str, Any], value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping) or not all(isinstance(k, str) and callable(v) for k, v in value.items()):
        raise HookFailedError(f"register_losses returned {_short(value)}; it returns a mapping of names to functions")
    return value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _short(value: Any) -> str:
    """Type, and the value only where it cannot hold text of a conversation."""
    return repr(value) if isinstance(value, int | float) else f"a value of type {type(value).__name__}"


_CHECKS: dict[str, Callable[[str, Mapping[str, Any], Any], Any]] = {
    "score_trace": _reward,
    "combine_rewards": _combined,
    "accept_adapter": _verdict,
    "accept_sample": _verdict,
    "training_window": _verdict,
    "redact_trace": _same_trace,
    "select_skills": _skills,
    "compute_advantages": _advantages,
    "register_losses": _losses,
}
