"""Adapter versions as they come, and the set of them that vLLM holds."""

from __future__ import annotations

import asyncio
import time
from typing import Annotated

from fastapi import APIRouter, Depends, Query, Request
from metaclaw_hooks.wire import Refusal, ServedReply, ServedRequest, VersionsReply
from starlette.concurrency import run_in_threadpool

from metaclaw_trainer.api.access import services_of
from metaclaw_trainer.services import Services

router = APIRouter(tags=["versions"])
Wired = Annotated[Services, Depends(services_of)]

_LOOK_EVERY = 0.1  # seconds; a version of another process is seen too


@router.get("/v1/versions")
async def list_versions(
    request: Request,
    services: Wired,
    after: Annotated[int, Query(ge=0, le=2**62, description="Cursor of the last version seen.")] = 0,
    wait: Annotated[float, Query(ge=0, le=60, description="Seconds to wait for a new one.")] = 0.0,
) -> VersionsReply:
    """Versions made after a cursor, in order; with ``wait`` the answer comes as soon as there is one."""
    deadline = time.monotonic() + wait
    while True:
        found = await run_in_threadpool(services.versions.after, after)
        if found or time.monotonic() >= deadline or await request.is_disconnected():
            return VersionsReply(versions=found)
        await asyncio.sleep(_LOOK_EVERY)


@router.put("/v1/served")
def put_served(body: ServedRequest, services: Wired) -> ServedReply:
    """Set the whole set of versions that every vLLM shall hold, and bring them to it now.

    What fails here because a vLLM is down stays wanted, and is loaded when it is back.
    """
    unknown = services.versions.set_served(body.versions)
    wanted = [name for name in dict.fromkeys(body.versions) if name not in unknown]
    states = services.reconciler.once(retry_refused=True)
    held, failed = services.reconciler.outcome(wanted, states)
    reasons = {**unknown, **failed}
    return ServedReply(held=held, failed=[Refusal(id=name[:200], reason=reason) for name, reason in reasons.items()])
