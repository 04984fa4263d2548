"""Whatever an upstream says, the client gets it, and nothing of what the gateway asked for besides (laws 1 and 5)."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metaclaw_plugin.capture.transport import Recording
from tests.tap_cases import RECORDED, TEXT_STREAM, Upstream, json_of, pass_through, recording_for

ANYTHING = st.sampled_from("a\x00\ud800\udfff") | st.characters(exclude_categories=())  # half surrogate pairs too
STREAM = {"content_type": "text/event-stream"}
INJECTED = {"token_ids": [7], "logprobs": {"content": [{"logprob": -0.5}]}}


def event(delta: Any, **more: Any) -> dict[str, Any]:
    return {"id": "c", "choices": [{"index": 0, "delta": delta, **INJECTED}], "prompt_token_ids": [1], **more}


def plain(value: dict[str, Any]) -> dict[str, Any]:
    """What vLLM says to a client that asked for nothing more; written without our code."""
    hidden = dict(value)
    if "prompt_token_ids" in hidden:
        hidden["prompt_token_ids"] = None
    if isinstance(hidden.get("choices"), list):
        hidden["choices"] = [
            part if not isinstance(part, dict) else {k: None if k in INJECTED else v for k, v in part.items()}
            for part in hidden["choices"]
        ]
    return hidden


def as_event(value: object) -> bytes:
    return f"data: {json.dumps(value)}\n\n".encode()


@pytest.mark.law(1)
@pytest.mark.law(5)
async def test_recording_that_fails_breaks_no_stream_and_hides_what_it_asked_for_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: object) -> None:
        raise AttributeError("what nobody thought of")

    monkeypatch.setattr("metaclaw_plugin.capture.reply._merge_delta", fail)
    case = RECORDED[TEXT_STREAM]
    recording = recording_for(case)
    _, chunks = await pass_through(Upstream([p.encode() for p in case["rich"]], content_type=case["type"]), recording)
    assert [json_of(chunk) for chunk in chunks] == [json_of(piece.encode()) for piece in case["plain"]]
    assert recording.reply.failure == "AttributeError in fail"
    assert recording.over


@pytest.mark.parametrize(
    "events",
    [
        [event({"foo": "a"}), event({"foo": [{"index": 0}]})],
        [event({"foo": [3]}), event({"foo": [{"index": 0, "a": "x"}]})],
        [event({"content": "half of a pair \ud800"})],
        [event({}, choices=[{"index": 0, "delta": {"content": "a"}, "logprobs": {"content": [{"logprob": 10**400}]}}])],
        [event({"content": {"a": json.loads("[" * 400 + "]" * 400)}})],
    ],
    ids=["string-then-parts", "numbers-then-parts", "half-a-pair", "a-logprob-past-all-floats", "deep"],
)
@pytest.mark.law(1)
async def test_what_no_model_says_passes_without_what_we_asked_for(events: list[dict[str, Any]]) -> None:
    recording = Recording(False, False)
    _, chunks = await pass_through(Upstream([as_event(e) for e in events], **STREAM), recording)
    assert [json_of(chunk) for chunk in chunks] == [plain(e) for e in events]
    recording = Recording(False, False)
    body = {"choices": [{"index": 0, "message": e["choices"][0]["delta"], **INJECTED} for e in events]}
    _, chunks = await pass_through(Upstream([json.dumps(body).encode()], content_type="application/json"), recording)
    assert json_of(chunks[0]) == plain(body)


async def test_bytes_that_are_no_text_hide_nothing_of_ours() -> None:
    said = as_event(event({"content": "caf?"})).replace(b"?", b"\xe9")
    _, chunks = await pass_through(Upstream([said], **STREAM), Recording(False, False))
    assert json_of(chunks[0]) == plain(event({"content": "caf\N{REPLACEMENT CHARACTER}"}))


async def test_what_is_nested_too_deeply_to_be_written_again_is_an_error_and_no_leak() -> None:
    deep = as_event(event({"content": "?"})).replace(b'"?"', b"[" * 1000 + b"]" * 1000)
    with pytest.raises(httpx.DecodingError):
        await pass_through(Upstream([deep], **STREAM), Recording(False, False))


_JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False)
    | st.text(ANYTHING, max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(ANYTHING, max_size=3), inner, max_size=3),
    max_leaves=6,
)
_KEYS = st.sampled_from(["content", "role", "tool_calls", "index", "function", "arguments", "foo"])
_DELTAS = st.recursive(
    _JSON, lambda inner: st.dictionaries(_KEYS, inner, max_size=3) | st.lists(inner, max_size=2), max_leaves=8
)
_IDS = _JSON | st.lists(st.integers(-1, 2**33), max_size=3)
_LOGPROBS = _JSON | st.fixed_dictionaries(
    {"content": _JSON | st.lists(st.fixed_dictionaries({"logprob": _JSON}), max_size=2)}
)
_CHOICES = _JSON | st.fixed_dictionaries(
    {"index": st.integers(0, 1) | _JSON, "delta": _DELTAS | st.dictionaries(_KEYS, _DELTAS, max_size=3)},
    optional={"message": _DELTAS, "finish_reason": _JSON, "token_ids": _IDS, "logprobs": _LOGPROBS},
)
_EVENTS = st.fixed_dictionaries(
    {"choices": _JSON | st.lists(_CHOICES, max_size=3), "prompt_token_ids": st.just([1]) | _IDS},
    optional={"id": _JSON, "model": _JSON},
)


@pytest.mark.law(1)
@given(events=st.lists(_EVENTS, min_size=1, max_size=4))
@settings(max_examples=200, deadline=None)
async def test_whatever_an_upstream_says_the_client_gets_it_and_nothing_of_ours(events: list[dict[str, Any]]) -> None:
    recording = Recording(False, False)
    _, chunks = await pass_through(Upstream([as_event(e) for e in events], **STREAM), recording)
    kept = [plain(e) for e in events if not _only_for_tokens(e)]
    assert [json.dumps(json_of(chunk)) for chunk in chunks] == [json.dumps(e) for e in kept]
    assert recording.over
    assert recording.reply.failure is None, "what can be foreseen is no failure"
    whole = events[0]
    _, chunks = await pass_through(
        Upstream([json.dumps(whole).encode()], content_type="application/json"), Recording(False, False)
    )
    assert json.dumps(json_of(chunks[0])) == json.dumps(plain(whole))


def _only_for_tokens(value: dict[str, Any]) -> bool:
    """Whether vLLM sends this event because token ids were asked for, and would not otherwise."""
    choices = value["choices"]
    return (
        bool(choices)
        and isinstance(choices, list)
        and all(
            isinstance(part, dict) and part.get("delta") == {} and part.get("finish_reason") is None for part in choices
        )
    )
