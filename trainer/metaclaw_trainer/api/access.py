"""What routes ask of the request: the wired rooms, and who is calling."""

from __future__ import annotations

from typing import Annotated, cast

from fastapi import Path as PathParameter
from fastapi import Request
from metaclaw_hooks.wire import AgentName

from metaclaw_trainer.services import Services

AgentInPath = Annotated[AgentName, PathParameter(description="Name of an agent: 1 to 63 of a-z, 0-9 and -.")]


def services_of(request: Request) -> Services:
    return cast(Services, request.app.state.services)


def caller_of(request: Request) -> str:
    """Name of the caller's key: who holds several of one name is one caller; empty while no key was made."""
    return cast(str, request.state.caller)
