"""Samples in, their rewards corrected, and traces out again when their owner deletes them."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from fastapi.exceptions import RequestValidationError
from metaclaw_hooks.errors import InvalidSampleError
from metaclaw_hooks.types import Sample
from metaclaw_hooks.wire import (
    RecallReply,
    RecallRequest,
    Refusal,
    RewardsReply,
    RewardsRequest,
    SampleBody,
    SamplesReply,
    SamplesRequest,
)
from pydantic import ValidationError
from pydantic_core import from_json
from starlette.concurrency import run_in_threadpool

from metaclaw_trainer.api.access import services_of
from metaclaw_trainer.api.replies import explain
from metaclaw_trainer.errors import QueueFullError
from metaclaw_trainer.services import Services

router = APIRouter(tags=["samples"])

# Read by hand below, so that FastAPI does not put its parts among the document's components: they are found in place.
_IN_PLACE = "#/paths/~1v1~1samples/post/requestBody/content/application~1json/schema/$defs/{model}"
_BODY = {
    "requestBody": {
        "required": True,
        "content": {"application/json": {"schema": SamplesRequest.model_json_schema(ref_template=_IN_PLACE)}},
    }
}
_MOST = 512  # samples in one request, as in wire.SamplesRequest


@router.post("/v1/samples", openapi_extra=_BODY)
async def put_samples(request: Request, services: Annotated[Services, Depends(services_of)]) -> SamplesReply:
    """Queue samples. Each is durable before the reply; sending one again changes nothing.

    One that cannot be accepted is refused by itself, so that it does not hold up the others. 429: some found no room;
    the others are queued, and sending all again is right.
    """
    return await run_in_threadpool(_put, services, await request.body())


def _put(services: Services, body: bytes) -> SamplesReply:
    good, refused = parse_samples(body)
    vetoed = [
        sample.id
        for sample in good
        if any(answer is False for _, answer in services.plugins.call_blocking("accept_sample", sample=sample))
    ]
    result = services.queue.put(good, vetoed)
    services.metrics.received(result, len(refused))
    if result.full:
        names = ", ".join(sorted({agent for _, agent in result.full}))
        raise QueueFullError(
            f"{len(result.full)} of {len(good)} samples found no room: the queue of {names} is full; "
            "the others are queued. Send these again later, or raise metaclaw.trainer.max_queued"
        )
    return SamplesReply(
        accepted=result.accepted,
        duplicate=result.duplicate,
        refused=[*refused, *(Refusal(id=name, reason=reason) for name, reason in result.refused)],
    )


def parse_samples(body: bytes) -> tuple[list[Sample], list[Refusal]]:
    """The samples of a request's body, and those that are none.

    Raises:
        RequestValidationError: if the body is no list of samples, or one of them has no id to refuse it by.
    """
    try:
        data = from_json(body, allow_inf_nan=True)
    except ValueError as error:
        raise _invalid(("body",), f"no JSON: {str(error).splitlines()[0]}") from error
    entries = data.get("samples") if isinstance(data, dict) else None
    if not isinstance(entries, list) or not 1 <= len(entries) <= _MOST or set(data) != {"samples"}:
        raise _invalid(("samples",), f"the body must be {{'samples': [...]}} with 1 to {_MOST} samples")
    good: list[Sample] = []
    refused: list[Refusal] = []
    for index, entry in enumerate(entries):
        name = entry.get("id") if isinstance(entry, dict) else None
        if not isinstance(name, str) or not name:
            raise _invalid(("samples", index, "id"), "a sample needs an id")
        try:
            good.append(SampleBody.model_validate(entry).sample())
        except ValidationError as error:
            refused.append(Refusal(id=name, reason=explain(error.errors(include_input=False, include_url=False))[:400]))
        except InvalidSampleError as error:
            refused.append(Refusal(id=name, reason=str(error)[:400]))
    return good, refused


def _invalid(place: tuple[str | int, ...], message: str) -> RequestValidationError:
    entry: dict[str, Any] = {"loc": place, "msg": message, "type": "value_error"}
    return RequestValidationError([entry])


@router.post("/v1/samples/recall")
def recall(body: RecallRequest, services: Annotated[Services, Depends(services_of)]) -> RecallReply:
    """Forget traces: waiting samples of theirs are removed, and the versions that learned from them are named."""
    removed, trained_into = services.queue.recall(body.trace_ids)
    return RecallReply(removed=removed, trained_into=trained_into)


@router.post("/v1/samples/rewards")
def set_rewards(body: RewardsRequest, services: Annotated[Services, Depends(services_of)]) -> RewardsReply:
    """Change rewards of queued traces, as late feedback does. What is trained already stays as it is."""
    changed, in_training = services.queue.set_rewards({change.trace_id: change.reward for change in body.rewards})
    return RewardsReply(changed=changed, in_training=in_training)
