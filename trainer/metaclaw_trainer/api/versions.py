"""Adapter versions as they come, and the set of them that vLLM holds."""

from __future__ import annotations

import asyncio
import hashlib
import time
from pathlib import Path
from typing import Annotated, Literal

from fastapi import APIRouter, Depends, Query, Request
from fastapi import Path as PathParameter
from fastapi.responses import FileResponse
from metaclaw_hooks.wire import SHA256_HEADER, Refusal, ServedReply, ServedRequest, VersionsReply
from starlette.concurrency import run_in_threadpool

from metaclaw_trainer.api.access import services_of
from metaclaw_trainer.errors import UnknownVersionError
from metaclaw_trainer.services import Services

router = APIRouter(tags=["versions"])
Wired = Annotated[Services, Depends(services_of)]
AdapterFile = Literal["adapter_config.json", "adapter_model.safetensors"]

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


@router.get("/v1/adapters/{name}/{file}", response_class=FileResponse)
def get_adapter_file(
    name: Annotated[str, PathParameter(description="A version, as agent@vN, or what vLLM serves for a session.")],
    file: Annotated[AdapterFile, PathParameter(description="One of the two files of an adapter.")],
    services: Wired,
) -> FileResponse:
    """A file of an adapter, for a machine that does not share this one's disk; its sha256 in the header x-sha256."""
    held = {wanted.name: wanted.path for wanted in services.runs.wanted()}
    folder = held.get(name) or services.versions.path_of(name)
    path = Path(folder) / file if folder else None
    if path is None or not path.is_file():
        raise UnknownVersionError(f"this trainer has no files of {name[:80]}; GET /v1/versions lists what it made")
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return FileResponse(path, media_type="application/octet-stream", headers={SHA256_HEADER: digest})


@router.put("/v1/served")
def put_served(body: ServedRequest, services: Wired) -> ServedReply:
    """Set the whole set of versions that every vLLM shall hold, and bring them to it now.

    The files of those in ``keep`` stay besides, whatever the disk budget, so that they can be gone back to. What fails
    here because a vLLM is down stays wanted, and is loaded when it is back.
    """
    unknown = services.versions.set_served(body.versions, body.keep)
    wanted = [name for name in dict.fromkeys(body.versions) if name not in unknown]
    states = services.reconciler.once(retry_refused=True)
    held, failed = services.reconciler.outcome(wanted, states)
    reasons = {**unknown, **failed}
    return ServedReply(held=held, failed=[Refusal(id=name[:200], reason=reason) for name, reason in reasons.items()])
