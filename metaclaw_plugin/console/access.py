"""Who is looking, and what they may do.

A session is a Fernet token in a cookie of ours, under a secret that is made from the console key: nothing is kept here,
and a new console key ends every session. Other cookies that the browser sends, such as LiteLLM's, are not looked at.
"""

from __future__ import annotations

import json
import logging
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated
from urllib.parse import urlsplit

from cryptography.fernet import Fernet, InvalidToken
from fastapi import Depends, Request, Response

from metaclaw_plugin.console.house import House, house_of
from metaclaw_plugin.console.keys import derived
from metaclaw_plugin.errors import MetaclawError

logger = logging.getLogger(__name__)

COOKIE = "metaclaw_console"
THEME_COOKIE = "metaclaw_theme"
CSRF_HEADER = "x-csrf-token"
CSRF_FIELD = "csrf"
_FRAMED = "_framed"
_LOCAL = frozenset({"localhost", "127.0.0.1", "::1"})


class SignInNeededError(MetaclawError):
    """Nobody is signed in, or no longer."""


class NotAllowedError(MetaclawError, PermissionError):
    """Who is signed in may not do this, or the request did not come from our own pages."""


@dataclass(frozen=True, slots=True)
class Visitor:
    """Whoever is signed in."""

    name: str
    may_act: bool
    csrf: str


@dataclass(frozen=True, slots=True)
class Action:
    """A form that someone who may act has sent from one of our pages."""

    visitor: Visitor
    fields: Mapping[str, str]

    def text(self, name: str) -> str:
        """A field's text; empty if it is not there."""
        return self.fields.get(name, "").strip()


def _fernet(house: House) -> Fernet:
    return Fernet(derived(house.key, "metaclaw console session"))


def sign_in(response: Response, request: Request, name: str, may_act: bool) -> None:
    """Give the browser a session of ``name``."""
    house = house_of(request)
    token = json.dumps({"name": name, "may_act": may_act, "csrf": secrets.token_urlsafe(24)})
    seconds = int(house.settings.console.session_hours * 3600)
    put_cookies(response, request, COOKIE, _fernet(house).encrypt(token.encode()).decode(), seconds)


def put_cookies(response: Response, request: Request, name: str, value: str, seconds: int) -> None:
    """Set a cookie; 0 seconds take it away.

    Inside LiteLLM's page our cookie is a third party's unless both have one host name. Where browsers allow it (https,
    and this machine) a second one is therefore set that is bound to the page that shows us.
    """
    secure = request.url.scheme == "https"
    shared = f"Max-Age={seconds}; Path=/; HttpOnly"
    response.headers.append("set-cookie", f"{name}={value}; {shared}; SameSite=Strict{'; Secure' if secure else ''}")
    if secure or (request.url.hostname or "") in _LOCAL:
        framed = f"{name}{_FRAMED}={value}; {shared}; Secure; SameSite=None; Partitioned"
        response.headers.append("set-cookie", framed)


def seal_note(house: House, text: str) -> str:
    """A line for the next page, which only we can write."""
    return _fernet(house).encrypt(f"note:{text[:400]}".encode()).decode()


def read_note(house: House, sealed: str) -> str:
    """That line; empty if it is not ours, or older than a minute."""
    try:
        text = _fernet(house).decrypt(sealed.encode(), ttl=60).decode()
    except (InvalidToken, ValueError):
        return ""
    return text.removeprefix("note:") if text.startswith("note:") else ""


def cookie(request: Request, name: str) -> str:
    """The value of a cookie of ours, however it was set; empty if it is not there."""
    found = ""
    for part in request.headers.get("cookie", "").split(";"):
        key, _, value = part.partition("=")
        if key.strip() in (name, name + _FRAMED) and value.strip():
            found = value.strip()
    return found


def find_visitor(request: Request) -> Visitor | None:
    """Who is signed in; ``None``: nobody."""
    house = house_of(request)
    value = cookie(request, COOKIE)
    if not value:
        return None
    try:
        ttl = int(house.settings.console.session_hours * 3600)
        told = json.loads(_fernet(house).decrypt(value.encode(), ttl=ttl))
    except (InvalidToken, ValueError):  # a note of ours is no session: it is no JSON
        return None
    return Visitor(told["name"], told["may_act"], told["csrf"])


def visitor(request: Request) -> Visitor:
    """Who is signed in.

    Raises:
        SignInNeededError: if nobody is.
    """
    found = find_visitor(request)
    if found is None:
        raise SignInNeededError("sign in first")
    return found


def check_origin(request: Request) -> None:
    """Raise ``NotAllowedError`` unless the request comes from a page of our own, or from no page at all."""
    site = request.headers.get("sec-fetch-site")
    origin = request.headers.get("origin")
    ours = site in (None, "same-origin", "none")
    if origin is not None and origin != "null":
        ours = ours and urlsplit(origin).netloc == request.headers.get("host")
    elif origin == "null":
        ours = False
    if not ours:
        raise NotAllowedError("this request came from another site's page; nothing was changed")


async def acting(request: Request, who: Annotated[Visitor, Depends(visitor)]) -> Action:
    """The form of an admin's that changes something.

    Raises:
        NotAllowedError: if it is not from our page, or from someone who may only look.
    """
    check_origin(request)
    form = await request.form(max_files=0, max_fields=50)
    fields = {name: value for name, value in form.items() if isinstance(value, str)}
    token = request.headers.get(CSRF_HEADER) or fields.get(CSRF_FIELD, "")
    if not secrets.compare_digest(token.encode(), who.csrf.encode()):
        raise NotAllowedError("the page was too old, or the request not from it; load it again, nothing was changed")
    if not who.may_act:
        raise NotAllowedError("you may look here, but not change anything: ask an admin")
    return Action(who, fields)


Looking = Annotated[Visitor, Depends(visitor)]
Acting = Annotated[Action, Depends(acting)]
