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


def test_a_sampled_text_answer_may_be_trained_on() -> None:
    assert reason() is None


def test_one_that_ran_into_max_tokens_was_sampled_like_any_other() -> None:
    assert reason(finish_reason="length") is None


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
        ({"response_format": {"type": "json_object"}}, "guided"),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, "guided"),
        ({"guided_regex": "a+"}, "guided"),
        ({"structured_outputs": {"choice": ["a"]}}, "guided"),
        ({"tool_choice": "required"}, "guided"),
        ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, "guided"),
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
