"""May this trace be trained on? One sentence says why not.

vLLM gives the log-probabilities of the model's own distribution, before anything reshapes it, and the trainer computes
the same. So the loss can account for mild temperatures and a top_p near 1 only: not for penalties, for what is cut off
or forbidden, for tokens that were forced (guided decoding), or for what the trainer cannot see (images).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from metaclaw_hooks.types import Kind, Sampling

from metaclaw_plugin.capture.reply import Choice, Reply
from metaclaw_plugin.settings import CaptureSettings

MAX_LOGPROB = 1e-4  # rounding may lift a certain token's logarithm a little above 0

WHOLE = frozenset({"stop", "length", "tool_calls"})  # of length, each token was sampled like any other

# Parameter -> its neutral values, at which each token is as likely as the model makes it.
_NUMBERS: dict[str, tuple[float, ...]] = {
    "top_k": (0, -1),
    "min_p": (0,),
    "repetition_penalty": (1,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
}
_OTHERS: dict[str, tuple[object, ...]] = {
    "min_tokens": (0,),
    "logit_bias": ({},),
    "allowed_token_ids": (),
    "bad_words": ([],),
    "thinking_token_budget": (),
    "watermarking": (False,),
    "logits_processors": ([],),
    "vllm_xargs": ({},),  # to a server's own processors
}
_GUIDES = ("guided_json", "guided_regex", "guided_choice", "guided_grammar", "structured_outputs", "structural_tag")
_KEPT = (*_OTHERS, *_GUIDES, "use_beam_search", "response_format", "tool_choice", "parallel_tool_calls")
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
    if guide := guide_of(request):
        return f"guided decoding: {guide}"
    return (
        _token_reason(reply, choice)
        or _end_reason(choice, complete)
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


def _end_reason(choice: Choice, complete: bool) -> str | None:
    if not complete or choice.finish_reason is None:
        return "cut off: the answer did not end properly"
    return None if choice.finish_reason in WHOLE else f"cut off: it ended with {choice.finish_reason[:40]!r}"


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
    if name := next((name for name in (*_NUMBERS, *_OTHERS) if _reshapes(name, request.get(name))), None):
        return f"{name} reshapes what is sampled, and the log-probabilities do not show it"
    return None


def _reshapes(name: str, value: object) -> bool:
    if value is None or value in (_NUMBERS.get(name) or _OTHERS.get(name) or ()):
        return False
    return not (name == "logit_bias" and isinstance(value, Mapping) and not any(value.values()))


def guide_of(request: Mapping[str, Any]) -> str | None:
    """What of the request makes a grammar, and not the model alone, choose the tokens; ``None``: nothing."""
    for name in _GUIDES:
        if request.get(name):
            return name
    layout = request.get("response_format")
    if isinstance(layout, Mapping) and layout.get("type") not in (None, "text"):
        return "response_format"
    return _guide_of_tools(request)


def _guide_of_tools(request: Mapping[str, Any]) -> str | None:
    """vLLM leaves the model free whether and how to call a tool under ``auto``, but for two wishes."""
    choice, tools = request.get("tool_choice"), request.get("tools")
    if choice == "required" or isinstance(choice, Mapping):
        return "tool_choice"
    if choice == "none" or not isinstance(tools, list) or not tools:
        return None
    if request.get("parallel_tool_calls") is False:
        return "parallel_tool_calls"
    functions = (tool.get("function") for tool in tools if isinstance(tool, Mapping))
    strict = any(isinstance(function, Mapping) and function.get("strict") is True for function in functions)
    return "strict tools" if strict else None


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
        min_p=_number(request.get("min_p")),
        repetition_penalty=_number(request.get("repetition_penalty")),
        presence_penalty=_number(request.get("presence_penalty")),
        frequency_penalty=_number(request.get("frequency_penalty")),
        max_tokens=_integer(request.get("max_completion_tokens", request.get("max_tokens"))),
        stop=tuple(item for item in several if isinstance(item, str)),
        seed=_integer(request.get("seed")),
        others={name: request[name] for name in _KEPT if request.get(name) is not None},
    )


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _integer(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None
