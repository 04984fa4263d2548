"""The console's application: pages, what guards them, and what an error looks like."""

from __future__ import annotations

import logging
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.staticfiles import StaticFiles
from metaclaw_hooks.errors import HooksError
from sqlalchemy.exc import SQLAlchemyError
from starlette.exceptions import HTTPException

from metaclaw_plugin.console.access import NotAllowedError, SignInNeededError
from metaclaw_plugin.console.guard import Guard
from metaclaw_plugin.console.house import House
from metaclaw_plugin.console.keys import console_key
from metaclaw_plugin.console.pages import FOLDER, page
from metaclaw_plugin.console.rooms import agent, conversation, door, health, overview, skills
from metaclaw_plugin.console.shared import Shared
from metaclaw_plugin.errors import (
    ConfigError,
    MetaclawError,
    SkillError,
    StoreError,
    UnknownAgentError,
    UnknownSessionError,
    UnknownTraceError,
    UnknownVersionError,
    VersionStateError,
)
from metaclaw_plugin.settings import Settings

logger = logging.getLogger(__name__)

SALT_ENV = "LITELLM_SALT_KEY"

_STATUS: tuple[tuple[type[Exception], int], ...] = (
    (NotAllowedError, 403),
    (UnknownAgentError, 404),
    (UnknownSessionError, 404),
    (UnknownTraceError, 404),
    (UnknownVersionError, 404),
    (VersionStateError, 409),
    (SkillError, 409),
    (ConfigError, 400),
    (StoreError, 503),
)


def create_app(settings: Settings, config: Path | None = None) -> FastAPI:
    """The console over the store and skills of ``settings``; ``config`` is the file that they came from.

    Raises:
        ConfigError: if the console key can be neither read nor made.
    """
    house = House(settings, config, console_key(settings), os.environ.get(SALT_ENV) or None)
    house.live = Shared(lambda after: overview.table(house, after), overview.EVERY)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        house.close()

    app = FastAPI(title="MetaClaw console", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.state.house = house
    app.mount("/static", StaticFiles(directory=FOLDER / "static"), name="static")
    for room in (door, overview, agent, conversation, skills, health):
        app.include_router(room.router)
    app.add_middleware(Guard, settings=settings)
    for kind in (MetaclawError, HooksError, SQLAlchemyError, RequestValidationError, HTTPException):
        app.add_exception_handler(kind, _explain)
    return app


def _explain(request: Request, error: Exception) -> Response:
    """A page for what went wrong, in the words of whoever raised it."""
    if isinstance(error, SignInNeededError):
        if request.headers.get("hx-request"):
            return Response(status_code=401, headers={"hx-refresh": "true"})
        return page(request, "sign_in.html", 401, problem="")
    if isinstance(error, HTTPException):
        return page(request, "error.html", error.status_code, title="Not found", problem=str(error.detail))
    if isinstance(error, RequestValidationError):
        first = error.errors()[0]
        problem = f"{first['loc'][-1]}: {first['msg']}"
        return page(request, "error.html", 400, title="This cannot be read", problem=problem)
    if isinstance(error, SQLAlchemyError):
        logger.error("the store does not answer: %s", type(error).__name__)
        return page(request, "error.html", 503, title="The store does not answer", problem="Try again in a moment.")
    status = next((code for kind, code in _STATUS if isinstance(error, kind)), 400)
    title = {403: "Not allowed", 404: "Not there", 503: "The store cannot be read"}.get(status, "That did not work")
    return page(request, "error.html", status, title=title, problem=str(error))
