"""May this trace be trained on? One sentence says why not.

The loss compares log-probabilities before temperature on both sides, so it can account for mild temperatures only; it
cannot account for tokens that were forced (guided decoding) or for what the trainer cannot see (images).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from metaclaw_hooks.types import Kind, Sampling

from metaclaw_plugin.capture.reply import Choice, Reply
from metaclaw_plugin.settings import CaptureSettings

MAX_LOGPROB = 1e-4  # rounding may lift a certain token's logarithm a little above 0

_GUIDES = ("guided_json", "guided_regex", "guided_choice", "guided_grammar", "structured_outputs", "structural_tag")
_TEXT_PARTS = frozenset({"text", "refusal", "thinking", "reasoning"})


def untrainable_reason(
    kind: Kind,
    request: Mapping[str, Any],
    reply: Reply,
    choice: Choice,
    complete: bool,
    settings: CaptureSettings,
) -> str | None:
    """Why this answer may not be trained on, or ``None`` if it may.

    ``request`` is the body that the sampler was sent, ``complete`` whether the upstream ended its answer properly.
    """
    if kind is Kind.SIDE:
        return "side call"
    if has_other_than_text(request.get("messages")):
        return "image or other content that is no text"
    if is_guided(request):
        return "guided decoding"
    return (
        _token_reason(reply, choice)
        or (None if complete and choice.finish_reason is not None else "cut off: the answer did not end properly")
        or _value_reason(reply, choice)
        or sampling_reason(sampling_of(request), request, settings)
    )


def _token_reason(reply: Reply, choice: Choice) -> str | None:
    if reply.garbled:
        return "the upstream sent something that is no chat completion"
    if reply.prompt_token_ids is None or choice.token_ids is None:
        return "no token ids from this upstream"
    if choice.logprobs is None:
        return "no log-probabilities from this upstream"
    return None


def _value_reason(reply: Reply, choice: Choice) -> str | None:
    ids, logprobs = choice.token_ids or [], choice.logprobs or []
    if not ids or not reply.prompt_token_ids:
        return "no sampled token"
    if len(ids) != len(logprobs):
        return f"lengths disagree: {len(ids)} token ids, {len(logprobs)} log-probabilities"
    if not all(math.isfinite(value) and value <= MAX_LOGPROB for value in logprobs):
        return "a log-probability that is none"
    return None


def sampling_reason(sampling: Sampling, request: Mapping[str, Any], settings: CaptureSettings) -> str | None:
    """Why the loss cannot account for the way this was sampled, if it cannot."""
    temperature, top_p = sampling.temperature, sampling.top_p
    if temperature is None:
        return "temperature unknown: neither client nor gateway set it"
    if temperature == 0 or sampling.top_k == 1 or request.get("use_beam_search"):
        return "greedy decoding"
    if not settings.min_temperature <= temperature <= settings.max_temperature:
        return f"temperature {temperature:g} is outside {settings.min_temperature:g}-{settings.max_temperature:g}"
    if top_p is not None and top_p < settings.min_top_p:
        return f"top_p {top_p:g} is under {settings.min_top_p:g}"
    return None


def is_guided(request: Mapping[str, Any]) -> bool:
    """Whether a grammar, and not the model alone, chose the tokens."""
    if any(request.get(name) for name in _GUIDES):
        return True
    layout = request.get("response_format")
    if isinstance(layout, Mapping) and layout.get("type") not in (None, "text"):
        return True
    choice = request.get("tool_choice")
    return choice == "required" or isinstance(choice, Mapping)


def has_other_than_text(messages: object) -> bool:
    """Whether any message holds a part that is no text."""
    return any(_part_kind(part) not in _TEXT_PARTS for part in _parts(messages))


def _parts(messages: object) -> Iterable[object]:
    for message in messages if isinstance(messages, Sequence) and not isinstance(messages, str) else ():
        content = message.get("content") if isinstance(message, Mapping) else None
        if isinstance(content, Sequence) and not isinstance(content, str):
            yield from content


def _part_kind(part: object) -> object:
    if isinstance(part, str):
        return "text"
    return part.get("type", "text") if isinstance(part, Mapping) else None


def sampling_of(request: Mapping[str, Any]) -> Sampling:
    """The parameters that a chat request asked the sampler for."""
    stop = request.get("stop")
    several = stop if isinstance(stop, list) else [stop]  # some upstreams take anything
    return Sampling(
        temperature=_number(request.get("temperature")),
        top_p=_number(request.get("top_p")),
        top_k=_integer(request.get("top_k")),
        max_tokens=_integer(request.get("max_completion_tokens", request.get("max_tokens"))),
        stop=tuple(item for item in several if isinstance(item, str)),
        seed=_integer(request.get("seed")),
    )


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _integer(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None
