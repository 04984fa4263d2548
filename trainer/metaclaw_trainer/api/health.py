"""Is the trainer up, and what does it run on; open to everyone, and says nothing of anyone's data."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends
from fastapi.responses import Response
from metaclaw_hooks.wire import HealthReply
from prometheus_client import CONTENT_TYPE_LATEST

from metaclaw_trainer.api.access import services_of
from metaclaw_trainer.libraries import library_versions
from metaclaw_trainer.services import Services

router = APIRouter(tags=["health"])
Wired = Annotated[Services, Depends(services_of)]


@router.get("/v1/health")
def health(services: Wired) -> HealthReply:
    """Open to callers without a key."""
    return HealthReply(
        status="ok",
        base_model=services.settings.base_model,
        device=services.device,
        versions=library_versions(),
    )


@router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
def metrics(services: Wired) -> Response:
    """Prometheus metrics."""
    return Response(services.metrics.render(), media_type=CONTENT_TYPE_LATEST)
