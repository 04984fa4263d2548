"""Samples and chat answers, drawn by vLLM with the adapter of whoever asks."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Annotated, Any

import httpx
from fastapi import APIRouter, Body, Depends
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.concurrency import run_in_threadpool

from metaclaw_trainer.api import fork_wire as wire
from metaclaw_trainer.api.access import caller_of, services_of
from metaclaw_trainer.errors import BadSamplingError, VllmUnavailableError
from metaclaw_trainer.services import Services
from metaclaw_trainer.thinking import DeltaSplitter, split_message
from metaclaw_trainer.vllm_client import SAMPLE_TIMEOUT, VllmClient, refusal_text

router = APIRouter(tags=["sampling"])
Wired = Annotated[Services, Depends(services_of)]
Caller = Annotated[str, Depends(caller_of)]


@router.post("/v1/sample")
def sample(body: wire.SampleRequest, services: Wired, caller: Caller) -> wire.SampleReply:
    """Continue token ids with the weights that the session saved last; without ``session_id``, the caller's last."""
    model = services.sampler.model_for(caller, body.session_id)
    parameters = {
        "temperature": body.temperature,
        "top_p": body.top_p,
        "top_k": body.top_k or -1,
        "stop": body.stop or [],
    }
    drawn = services.sampler.draw(model, body.tokens, body.num_samples, body.max_tokens, parameters)
    return wire.SampleReply(
        sequences=[
            wire.SequenceBody(
                tokens=list(one.token_ids), logprobs=list(one.logprobs), stop_reason=one.finish_reason or "stop"
            )
            for one in drawn
        ]
    )


@router.post("/v1/chat/completions", response_model=None)
async def chat(body: Annotated[dict[str, Any], Body()], services: Wired, caller: Caller) -> Response:
    """OpenAI's chat completion, answered with the same weights; ``<think>`` comes as ``reasoning_content``."""
    session_id, asked = body.pop("session_id", None), body.get("model")
    if not isinstance(body.get("messages"), list) or not isinstance(session_id, str | None):
        raise BadSamplingError("a chat request needs messages, a list; session_id, if any, is a string")
    model = await run_in_threadpool(
        services.sampler.model_for, caller, session_id, asked if isinstance(asked, str) else None
    )
    client, name = await run_in_threadpool(services.sampler.place, model)
    request = {**body, "model": name}
    if body.get("stream"):
        return await _streamed(client, request)
    async with client.asynchronous(SAMPLE_TIMEOUT) as http:
        answer = await _sent(http, client.url, http.build_request("POST", "/v1/chat/completions", json=request))
        await answer.aread()
    if answer.is_error:
        return _passed_on(answer)
    reply = answer.json()
    for choice in reply["choices"]:
        choice["message"] = split_message(choice["message"])
    return JSONResponse(reply)


async def _streamed(client: VllmClient, request: dict[str, Any]) -> Response:
    http = client.asynchronous(SAMPLE_TIMEOUT)
    try:
        answer = await _sent(http, client.url, http.build_request("POST", "/v1/chat/completions", json=request))
        if answer.is_error:
            await answer.aread()
            await http.aclose()
            return _passed_on(answer)
    except VllmUnavailableError:
        await http.aclose()
        raise
    return StreamingResponse(_events(http, answer), media_type="text/event-stream")


async def _sent(http: httpx.AsyncClient, url: str, request: httpx.Request) -> httpx.Response:
    try:
        return await http.send(request, stream=True)
    except httpx.HTTPError as error:
        raise VllmUnavailableError(f"vLLM at {url} cannot be reached ({error}); is it running?") from error


def _passed_on(answer: httpx.Response) -> JSONResponse:
    """vLLM's refusal, in our form and with its status; what it cannot do at all is 503."""
    status = answer.status_code if answer.status_code < 500 else 503
    kind = "invalid_request_error" if status < 500 else "server_error"
    error = {"message": f"vLLM refused: {refusal_text(answer)}", "type": kind, "code": "vllm_refused"}
    return JSONResponse({"error": error}, status)


async def _events(http: httpx.AsyncClient, answer: httpx.Response) -> AsyncIterator[str]:
    splitter = DeltaSplitter()
    try:
        async for line in answer.aiter_lines():
            if not line.startswith("data: "):
                continue
            data = line.removeprefix("data: ")
            if data != "[DONE]":
                data = json.dumps(splitter.chunk(json.loads(data)), ensure_ascii=False)
            yield f"data: {data}\n\n"
    finally:
        await answer.aclose()
        await http.aclose()
