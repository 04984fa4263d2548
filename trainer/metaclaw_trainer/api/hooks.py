"""Which plugins this process has, and what they did since it started."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends
from metaclaw_hooks.wire import HookFigures, HooksReply

from metaclaw_trainer.api.access import services_of
from metaclaw_trainer.services import Services

router = APIRouter(tags=["hooks"])


@router.get("/v1/hooks")
def hooks(services: Annotated[Services, Depends(services_of)]) -> HooksReply:
    """The trainer's plugins with calls, failures and seconds, and what could not be loaded."""
    found = [
        HookFigures(
            plugin=info.name,
            origin=info.origin,
            agent=info.agent,
            hook=hook,
            calls=stats.calls,
            failures=stats.failures,
            seconds=stats.seconds,
        )
        for info in services.plugins.describe()
        for hook, stats in info.hooks.items()
    ]
    return HooksReply(hooks=found, problems=dict(services.plugins.problems))
