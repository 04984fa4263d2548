"""Which answers may be trained on, and the sentence that says why not."""

from __future__ import annotations

from typing import Any

import pytest
from metaclaw_hooks.types import Kind

from metaclaw_plugin.capture.reply import Choice, Reply
from metaclaw_plugin.capture.verdict import sampling_of, untrainable_reason
from metaclaw_plugin.settings import CaptureSettings

GOOD = {"messages": [{"role": "user", "content": "hi"}], "temperature": 1.0, "top_p": 1.0}


def reason(
    request: dict[str, Any] | None = None,
    kind: Kind = Kind.MAIN,
    complete: bool = True,
    reply: Reply | None = None,
    **of_choice: Any,
) -> str | None:
    choice = Choice(0, finish_reason="stop", token_ids=[5, 2], logprobs=[-0.5, 0.0])
    for name, value in of_choice.items():
        setattr(choice, name, value)
    whole = reply or Reply(prompt_token_ids=[1, 2, 3])
    return untrainable_reason(kind, GOOD | (request or {}), whole, choice, complete, CaptureSettings())


def tool(**more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}, **more}}


def test_a_sampled_text_answer_may_be_trained_on() -> None:
    assert reason() is None


@pytest.mark.parametrize("ended", ["stop", "length", "tool_calls"])
def test_an_answer_that_ended_by_itself_or_ran_into_max_tokens_is_whole(ended: str) -> None:
    assert reason(finish_reason=ended) is None


@pytest.mark.law(2)
@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"kind": Kind.SIDE}, "side call"),
        ({"token_ids": None}, "no token ids"),
        ({"logprobs": None}, "no log-probabilities"),
        ({"reply": Reply()}, "no token ids"),
        ({"reply": Reply(prompt_token_ids=[])}, "no sampled token"),
        ({"reply": Reply(prompt_token_ids=[1], garbled=True)}, "no chat completion"),
        ({"token_ids": []}, "no sampled token"),
        ({"logprobs": [-0.5]}, "lengths disagree: 2 token ids, 1 log-probabilities"),
        ({"logprobs": [-0.5, float("nan")]}, "log-probability that is none"),
        ({"logprobs": [-0.5, float("-inf")]}, "log-probability that is none"),
        ({"logprobs": [-0.5, 0.3]}, "log-probability that is none"),
        ({"finish_reason": None}, "cut off"),
        ({"complete": False}, "cut off"),
        ({"finish_reason": "abort"}, "cut off: it ended with 'abort'"),
        ({"finish_reason": "error"}, "cut off: it ended with 'error'"),
        ({"finish_reason": "repetition"}, "cut off: it ended with 'repetition'"),
        ({"finish_reason": "content_filter"}, "cut off: it ended with 'content_filter'"),
    ],
)
def test_what_cannot_be_trusted_is_not_trained_on(changed: dict[str, Any], said: str) -> None:
    assert said in (reason(**changed) or "")


@pytest.mark.parametrize(
    ("request_field", "said"),
    [
        ({"temperature": None}, "temperature unknown"),
        ({"temperature": 0}, "greedy"),
        ({"top_k": 1}, "greedy"),
        ({"use_beam_search": True}, "greedy"),
        ({"temperature": 0.49}, "outside 0.5-1.2"),
        ({"temperature": 1.21}, "outside 0.5-1.2"),
        ({"top_p": 0.89}, "under 0.9"),
        ({"top_k": 2}, "top_k reshapes"),
        ({"top_k": "2"}, "top_k reshapes"),
        ({"min_p": 0.9}, "min_p reshapes"),
        ({"repetition_penalty": 1.8}, "repetition_penalty reshapes"),
        ({"repetition_penalty": 0.5}, "repetition_penalty reshapes"),
        ({"frequency_penalty": 2}, "frequency_penalty reshapes"),
        ({"presence_penalty": -0.1}, "presence_penalty reshapes"),
        ({"min_tokens": 3}, "min_tokens reshapes"),
        ({"logit_bias": {"5": 100}}, "logit_bias reshapes"),
        ({"allowed_token_ids": [1, 2]}, "allowed_token_ids reshapes"),
        ({"bad_words": ["no"]}, "bad_words reshapes"),
        ({"thinking_token_budget": 0}, "thinking_token_budget reshapes"),
        ({"watermarking": True}, "watermarking reshapes"),
        ({"logits_processors": ["x"]}, "logits_processors reshapes"),
        ({"vllm_xargs": {"x": 0}}, "vllm_xargs reshapes"),
        ({"response_format": {"type": "json_object"}}, "guided decoding: response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, "guided decoding: response_format"),
        ({"guided_json": {"type": "object"}}, "guided decoding: guided_json"),
        ({"guided_regex": "a+"}, "guided decoding: guided_regex"),
        ({"guided_choice": ["a"]}, "guided decoding: guided_choice"),
        ({"guided_grammar": "root ::= a"}, "guided decoding: guided_grammar"),
        ({"structured_outputs": {"choice": ["a"]}}, "guided decoding: structured_outputs"),
        ({"tool_choice": "required"}, "guided decoding: tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, "guided decoding: tool_choice"),
        ({"tools": [tool(strict=True)]}, "guided decoding: strict tools"),
        ({"tools": [tool(), tool(strict=True)], "tool_choice": "auto"}, "guided decoding: strict tools"),
        ({"tools": [tool()], "parallel_tool_calls": False}, "guided decoding: parallel_tool_calls"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "image"),
        ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "image or other"),
    ],
)
def test_sampling_that_the_loss_cannot_account_for_is_not_trained_on(request_field: dict[str, Any], said: str) -> None:
    assert said in (reason(request_field) or "")


@pytest.mark.parametrize(
    "request_field",
    [
        {"temperature": 0.5},
        {"temperature": 1.2},
        {"top_p": 0.9},
        {"top_p": None},
        {"response_format": {"type": "text"}},
        {"tool_choice": "auto"},
        {"tool_choice": "none"},
        {"tools": [tool()], "tool_choice": "auto", "parallel_tool_calls": True},
        {"tools": [tool(strict=False)]},
        {"tools": [tool(strict=True)], "tool_choice": "none"},
        {"tools": [], "parallel_tool_calls": False},
        {"top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0, "frequency_penalty": 0.0},
        {"top_k": -1, "min_tokens": 0, "logit_bias": {}, "bad_words": [], "vllm_xargs": {}, "watermarking": False},
        {"top_k": None, "logit_bias": {"5": 0}, "allowed_token_ids": None, "structured_outputs": None},
        {"seed": 7, "stop": ["x"], "n": 3, "ignore_eos": True, "skip_special_tokens": False},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}, {"role": "tool", "content": "1"}]},
    ],
)
def test_what_is_within_bounds_may_be_trained_on(request_field: dict[str, Any]) -> None:
    assert reason(request_field) is None


def test_the_bounds_are_settings() -> None:
    settings = CaptureSettings(min_temperature=0.1, max_temperature=2.0, min_top_p=0.1)
    choice = Choice(0, finish_reason="stop", token_ids=[5], logprobs=[-0.5])
    request = GOOD | {"temperature": 0.2, "top_p": 0.2}
    assert untrainable_reason(Kind.MAIN, request, Reply(prompt_token_ids=[1]), choice, True, settings) is None


@pytest.mark.parametrize(
    ("stop", "kept"), [("a", ("a",)), (["a", 3, None], ("a",)), (5, ()), (-2.5e61, ()), ({"a": 1}, ()), (None, ())]
)
def test_stops_of_any_kind_are_read_as_far_as_they_are_words(stop: object, kept: tuple[str, ...]) -> None:
    assert sampling_of({"stop": stop}).stop == kept


def test_what_decided_over_the_tokens_is_kept_with_the_trace() -> None:
    numbers = {"top_k": 2, "min_p": 0.1, "repetition_penalty": 1.5, "presence_penalty": 0.5, "frequency_penalty": -0.5}
    others = {
        "min_tokens": 3,
        "logit_bias": {"5": 1.5},
        "allowed_token_ids": [1],
        "bad_words": ["no"],
        "structured_outputs": {"choice": ["a"]},
        "tool_choice": "required",
    }
    sampling = sampling_of({"model": "m", "temperature": 1, **numbers, **others})
    assert sampling.others == others
    assert {name: getattr(sampling, name) for name in numbers} == numbers
