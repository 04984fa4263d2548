"""Signing in: by LiteLLM's claim, or with the console key."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from typing import Annotated, Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse, RedirectResponse
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.datastructures import UploadFile

from metaclaw_plugin.console.access import COOKIE, THEME_COOKIE, NotAllowedError, check_origin, put_cookies, sign_in
from metaclaw_plugin.console.claims import MAX_LENGTH, Claim, read_claim, take_claim
from metaclaw_plugin.console.house import House, house_of
from metaclaw_plugin.console.pages import THEMES, page
from metaclaw_plugin.errors import ClaimError

logger = logging.getLogger(__name__)
router = APIRouter()

BY_KEY = "console key"
YEAR = 365 * 86_400


class ClaimBody(BaseModel):
    """What the admin UI handed to our page."""

    model_config = ConfigDict(extra="forbid")

    session_claim: Annotated[str, Field(min_length=1, max_length=MAX_LENGTH)]


@router.get("/healthz")
def ready() -> Response:
    return Response("ok", media_type="text/plain")


@router.get("/api/plugin-manifest")
def manifest(request: Request) -> dict[str, Any]:
    """What LiteLLM's documentation asks of a plugin; it holds nothing that is not public."""
    console = house_of(request).settings.console
    return {"name": console.plugin_name, "display_name": "MetaClaw", "nav": [{"label": "Agents", "path": "/"}]}


@router.post("/api/plugin-auth")
async def by_claim(request: Request) -> Response:
    """Sign in whom LiteLLM vouches for."""
    house = house_of(request)
    try:
        check_origin(request)
        body = ClaimBody.model_validate_json(await request.body())
        claim = await asyncio.to_thread(_take, house, body.session_claim)
    except (ClaimError, NotAllowedError) as error:
        logger.warning("a sign-in through LiteLLM was refused: %s", error)
        return JSONResponse({"error": str(error)}, 403)
    except ValidationError:
        return JSONResponse({"error": "the body is JSON with a session_claim, as LiteLLM's admin UI sends it"}, 400)
    logger.info("signed in through LiteLLM; may act: %s", claim.may_act)
    answer = Response(status_code=204)
    sign_in(answer, request, claim.user, claim.may_act)
    return answer


def _take(house: House, text: str) -> Claim:
    settings = house.settings.console
    now = time.time()
    claim = read_claim(text, settings.salt_key or house.salt_key, settings.plugin_name, now)
    with house.writing() as c:
        take_claim(c, text, now)
    return claim


@router.post("/sign-in")
async def by_key(request: Request) -> Response:
    """Sign in with the console key, as an admin."""
    check_origin(request)
    form = await request.form(max_files=0, max_fields=5)
    given = form.get("key", "")
    key = "" if isinstance(given, UploadFile) else given.strip()
    if not secrets.compare_digest(key.encode("utf-8", "replace"), house_of(request).key.encode()):
        logger.warning("a sign-in with a wrong console key was refused")
        return page(request, "sign_in.html", 403, problem="That is not the console key.")
    answer = RedirectResponse("/", 303)
    sign_in(answer, request, BY_KEY, True)
    return answer


@router.post("/sign-out")
async def sign_out(request: Request) -> Response:
    check_origin(request)
    answer = RedirectResponse("/", 303)
    put_cookies(answer, request, COOKIE, "", 0)
    return answer


@router.post("/theme")
async def theme(request: Request) -> Response:
    """Light, dark, or as the browser and LiteLLM's page say."""
    check_origin(request)
    form = await request.form(max_files=0, max_fields=5)
    chosen = form.get("theme")
    answer = RedirectResponse("/", 303)
    if isinstance(chosen, str) and chosen in THEMES:
        put_cookies(answer, request, THEME_COOKIE, chosen, YEAR)
    return answer
