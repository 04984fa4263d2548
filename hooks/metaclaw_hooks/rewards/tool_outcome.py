"""How the tools that a reply called came out, read from what followed: errors, exit codes, the same call again."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from metaclaw_hooks.hookspecs import hookimpl
from metaclaw_hooks.rewards.following import messages_after
from metaclaw_hooks.types import Message, Reward, Trace, message_text

SOURCE = "tool_outcome"

# Tools say anything: what repeats in a pattern is bounded, so that no result takes longer than its length.
_EXIT = re.compile(
    r"\b(?:exit(?:ed)?(?: with)?(?: (?:code|status))?|returncode|exit[_ ]code)\"?\s{0,8}[:=]?\s{0,8}(-?\d{1,9})\b", re.I
)
_ERROR = re.compile(
    r"Traceback \(most recent call last\)|^[^\S\n]*(?:fatal |\w*)error\b\s{0,8}:|command not found"
    r"|No such file or directory"
    r"|Permission denied|\bENOENT\b|\bEACCES\b|segmentation fault|invalid (?:arguments?|parameters?)|unknown tool",
    re.I | re.M,
)
_LOOKED_AT = 8000  # characters of a result: errors stand at its beginning or its end


class ToolOutcomeReward:
    """Rewards a reply that called tools: +0.4 when all went well, down to -0.8 when all failed."""

    SCORES_LONE_REPLY = False
    INLINE = True

    @hookimpl
    def score_trace(self, trace: Trace, next_trace: Trace | None) -> Reward | None:
        calls = _calls(trace.response)
        if not calls or next_trace is None:
            return None
        results = [m for m in messages_after(trace, next_trace) if m.get("role") == "tool"]
        judged = [(text, *_judge(text)) for text in map(message_text, results)]
        if not judged:
            return None
        failed = sum(bad for _, bad, _ in judged)
        confidence = min(sure for _, _, sure in judged)
        again = {_key(call) for call in calls} & {_key(call) for call in _calls(next_trace.response)}
        if again and failed:
            return Reward(SOURCE, -0.9, f"{failed} of {len(judged)} tool calls failed, and were made again", confidence)
        if again:
            return Reward(SOURCE, -0.4, "the same tool call was made again at once", 0.4)
        value = 0.4 - 1.2 * failed / len(judged)
        return Reward(SOURCE, round(value, 4), f"{failed} of {len(judged)} tool calls failed", confidence)


def _judge(text: str) -> tuple[bool, float]:
    """Whether a tool's result is a failure, and how sure that is."""
    shown = text if len(text) <= 2 * _LOOKED_AT else text[:_LOOKED_AT] + text[-_LOOKED_AT:]
    try:
        data: Any = json.loads(text)
    except (ValueError, RecursionError):
        data = None
    if isinstance(data, Mapping):
        for name in ("is_error", "isError"):
            if isinstance(data.get(name), bool):
                return bool(data[name]), 0.9
        for name in ("exit_code", "exitCode", "returncode"):
            if isinstance(data.get(name), int):
                return data[name] != 0, 0.9
        if data.get("error"):
            return True, 0.8
        if data.get("status") in ("error", "failed"):
            return True, 0.8
    if codes := _EXIT.findall(shown):
        return int(codes[-1]) != 0, 0.8
    if _ERROR.search(shown):
        return True, 0.5
    return False, 0.3


def _calls(message: Message) -> Sequence[Mapping[str, Any]]:
    calls = message.get("tool_calls")
    return [call for call in calls if isinstance(call, Mapping)] if isinstance(calls, list | tuple) else []


def _key(call: Mapping[str, Any]) -> tuple[str, str]:
    """Name and arguments; clients change ids of calls on the way, so these are not compared."""
    function = call.get("function")
    if not isinstance(function, Mapping):
        return "", json.dumps(call, sort_keys=True, default=str)
    arguments = function.get("arguments")
    try:
        arguments = json.dumps(json.loads(arguments), sort_keys=True) if isinstance(arguments, str) else arguments
    except (ValueError, RecursionError):
        arguments = str(arguments)
    return str(function.get("name")), str(arguments)
