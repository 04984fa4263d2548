"""The tap, fed with what a real vLLM sent (tests/data/vllm_replies.json) and with what a broken one might."""

from __future__ import annotations

import gzip
import json

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metaclaw_plugin.capture.transport import Recording, TapTransport
from tests.tap_cases import RECORDED, TEXT_STREAM, Upstream, json_of, pass_through, recording_for

STREAMS = [name for name, case in RECORDED.items() if case["type"].startswith("text/event-stream")]


@pytest.mark.law(1)
@pytest.mark.parametrize("name", RECORDED)
async def test_what_leaves_the_tap_is_what_vllm_sends_to_a_client_that_asked_for_nothing_more(name: str) -> None:
    case = RECORDED[name]
    rich = [piece.encode() for piece in case["rich"]]
    _, chunks = await pass_through(Upstream(rich, case["status"], content_type=case["type"]), recording_for(case))
    assert [json_of(chunk) for chunk in chunks] == [json_of(piece.encode()) for piece in case["plain"]]


@pytest.mark.law(2)
@pytest.mark.parametrize("name", [name for name, case in RECORDED.items() if case["status"] == 200])
async def test_ids_and_logprobs_are_recorded_as_vllm_sent_them(name: str) -> None:
    case = RECORDED[name]
    recording = recording_for(case)
    rich = [piece.encode() for piece in case["rich"]]
    await pass_through(Upstream(rich, content_type=case["type"]), recording)
    prompt: list[int] | None = None
    ids: dict[int, list[int]] = {}
    logprobs: dict[int, list[float]] = {}
    for event in (json_of(piece) for piece in rich if b"[DONE]" not in piece):
        prompt = prompt or event.get("prompt_token_ids")
        for choice in event["choices"]:
            ids.setdefault(choice["index"], []).extend(choice.get("token_ids") or [])
            entries = (choice["logprobs"] or {"content": []})["content"]
            logprobs.setdefault(choice["index"], []).extend(entry["logprob"] for entry in entries)
    assert recording.complete
    assert recording.over
    assert prompt
    assert recording.reply.prompt_token_ids == prompt
    for index, choice in recording.reply.choices.items():
        assert choice.token_ids == ids[index]
        assert choice.logprobs == logprobs[index]
        assert len(choice.token_ids) == len(choice.logprobs) > 0
    assert sorted(recording.reply.choices) == list(range(case["request"].get("n", 1)))


@pytest.mark.parametrize("name", STREAMS)
@given(data=st.data())
@settings(max_examples=20, deadline=None)
async def test_it_does_not_matter_how_the_network_cuts_a_stream(name: str, data: st.DataObject) -> None:
    case = RECORDED[name]
    whole = "".join(case["rich"]).encode()
    cuts = sorted(data.draw(st.sets(st.integers(1, len(whole) - 1), max_size=12)))
    pieces = [whole[a:b] for a, b in zip([0, *cuts], [*cuts, len(whole)], strict=True)]
    one, other = recording_for(case), recording_for(case)
    _, at_once = await pass_through(Upstream([whole], content_type=case["type"]), one)
    _, in_pieces = await pass_through(Upstream(pieces, content_type=case["type"]), other)
    assert b"".join(in_pieces) == b"".join(at_once)
    assert other.reply == one.reply


@pytest.mark.law(1)
async def test_every_event_leaves_as_soon_as_it_is_whole() -> None:
    rich = [piece.encode() for piece in RECORDED[TEXT_STREAM]["rich"]]
    _, chunks = await pass_through(Upstream(rich, content_type="text/event-stream"), Recording(False, False))
    assert len(chunks) == len(rich)


async def test_without_a_recording_bytes_and_headers_pass_untouched() -> None:
    upstream = Upstream([b"data: {", b"}\n\n"], content_type="text/event-stream", x_own="1")
    response, chunks = await pass_through(upstream, None)
    assert chunks == [b"data: {", b"}\n\n"]
    assert response.headers["x-own"] == "1"


async def test_the_body_that_vllm_was_sent_is_recorded_and_compression_is_not_asked_for() -> None:
    recording = Recording(False, False)
    upstream = Upstream([b"{}"], content_type="application/json")
    await pass_through(upstream, recording, body=b'{"messages": []}')
    assert recording.request_body == b'{"messages": []}'
    assert upstream.request is not None
    assert upstream.request.headers["accept-encoding"] == "identity"


@pytest.mark.parametrize("name", ["text-whole", TEXT_STREAM])
async def test_a_proxy_that_compresses_all_the_same_is_understood(name: str) -> None:
    case = RECORDED[name]
    packed = gzip.compress("".join(case["rich"]).encode())
    recording = recording_for(case)
    upstream = Upstream([packed[:50], packed[50:]], content_type=case["type"], content_encoding="gzip")
    response, chunks = await pass_through(upstream, recording)
    assert "content-encoding" not in response.headers
    assert b"".join(chunks).startswith((b"data: {", b"{"))
    assert recording.complete
    assert recording.reply.choices[0].token_ids


async def test_the_declared_length_is_that_of_what_is_passed_on() -> None:
    case = RECORDED["text-whole"]
    body = case["rich"][0].encode()
    upstream = Upstream([body], content_type=case["type"], content_length=str(len(body)))
    response, chunks = await pass_through(upstream, Recording(False, False))
    assert int(response.headers["content-length"]) == len(b"".join(chunks)) < len(body)


@pytest.mark.parametrize("status", [400, 404, 429, 500, 503])
async def test_an_error_passes_and_leaves_nothing_to_store(status: int) -> None:
    recording = Recording(False, False)
    _, chunks = await pass_through(Upstream([b'{"error": 1}'], status, content_type="application/json"), recording)
    assert chunks == [b'{"error": 1}']
    assert recording.over
    assert not recording.answered


@pytest.mark.parametrize(
    "garbage", [b"data: nonsense\n\n", b"data: [1]\n\n", b'data: {"choices": [{"index": "x"}]}\n\n']
)
async def test_garbage_in_a_stream_passes_as_it_is_and_is_remembered(garbage: bytes) -> None:
    recording = Recording(False, False)
    rich = [piece.encode() for piece in RECORDED[TEXT_STREAM]["rich"]]
    pieces = [rich[0], rich[1], garbage, *rich[2:]]
    _, chunks = await pass_through(Upstream(pieces, content_type="text/event-stream"), recording)
    assert chunks[2] == garbage
    assert recording.reply.garbled
    assert not recording.complete


async def test_half_a_stream_is_over_but_not_complete() -> None:
    recording = Recording(False, False)
    rich = [piece.encode() for piece in RECORDED[TEXT_STREAM]["rich"]]
    upstream = Upstream([*rich[:2], httpx.ReadError("gone")], content_type="text/event-stream")
    with pytest.raises(httpx.ReadError):
        await pass_through(upstream, recording)
    assert recording.over
    assert recording.answered
    assert not recording.complete


async def test_an_unfinished_last_line_is_passed_on_at_the_end() -> None:
    _, chunks = await pass_through(
        Upstream([b"data: [DO", b"NE]"], content_type="text/event-stream"), Recording(False, False)
    )
    assert b"".join(chunks) == b"data: [DONE]"


async def test_numbers_that_json_libraries_disagree_about_survive() -> None:
    body = b'{"choices": [], "prompt_token_ids": [1], "big": 123456789012345678901234567890, "odd": NaN}'
    _, chunks = await pass_through(Upstream([body], content_type="application/json"), Recording(False, False))
    assert b"123456789012345678901234567890" in chunks[0]
    assert json.loads(chunks[0])["prompt_token_ids"] is None


@pytest.mark.parametrize(
    "body",
    [b'{"model": "alpha", "messages": [{"content": "\\"model\\": \\"x\\""}]}', b'{"messages": [], "model": "a"}'],
)
@pytest.mark.parametrize("kept", [True, False])
async def test_the_upstream_is_asked_for_the_model_of_the_route(body: bytes, kept: bool) -> None:
    recording = Recording(False, False, model="alpha@v3", kept=kept)
    upstream = Upstream([b'{"choices": []}'], content_type="application/json")
    await pass_through(upstream, recording, body)
    assert upstream.request is not None
    sent = await upstream.request.aread()
    assert json.loads(sent) == json.loads(body) | {"model": "alpha@v3"}
    assert int(upstream.request.headers["content-length"]) == len(sent)
    assert recording.request_body == (sent if kept else b"")


@pytest.mark.law(3)
async def test_a_request_that_is_sent_again_over_a_new_connection_is_recorded_anew() -> None:
    case = RECORDED[TEXT_STREAM]
    recording = recording_for(case)
    half = [*(piece.encode() for piece in case["rich"][:2]), httpx.ReadError("gone")]
    with pytest.raises(httpx.ReadError):
        await pass_through(Upstream(half, content_type=case["type"]), recording)
    upstream = Upstream([piece.encode() for piece in case["rich"]], content_type=case["type"])
    tap = TapTransport(upstream, lambda: recording)
    response = await tap.handle_async_request(httpx.Request("POST", "http://u/", content=b"{}"))
    assert isinstance(response.stream, httpx.AsyncByteStream)
    over = []
    async for _ in response.stream:
        over.append(recording.over)
    assert over == [False] * (len(case["rich"]) - 1) + [True]
    alone = recording_for(case)
    await pass_through(upstream, alone)
    assert recording.reply == alone.reply
    assert recording.complete
