"""From templates to answers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import jinja2
from fastapi import Request, Response
from fastapi.responses import HTMLResponse, RedirectResponse

from metaclaw_plugin import __version__
from metaclaw_plugin.console import shown
from metaclaw_plugin.console.access import THEME_COOKIE, Visitor, cookie, find_visitor, read_note, seal_note
from metaclaw_plugin.console.house import house_of

FOLDER = Path(__file__).parent
THEMES = ("auto", "light", "dark")


def make_templates() -> jinja2.Environment:
    """The templates, with everything escaped and no name that may be missing."""
    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(FOLDER / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for name in ("visible", "ago", "moment", "signed"):
        templates.filters[name] = getattr(shown, name)
    templates.globals["release"] = __version__
    return templates


_TEMPLATES = make_templates()


def fragment(name: str, values: Mapping[str, Any]) -> str:
    """A template's text."""
    return _TEMPLATES.get_template(name).render(values)


def page(request: Request, template: str, status: int = 200, **values: Any) -> Response:
    """A whole page. ``visitor`` is who is signed in, or nobody."""
    visitor: Visitor | None = values.pop("visitor", None) or find_visitor(request)
    theme = cookie(request, THEME_COOKIE)
    everywhere = {
        "visitor": visitor,
        "theme": theme if theme in THEMES else "auto",
        "path": request.url.path,
        "said": read_note(house_of(request), request.query_params.get("said", "")),
    }
    return HTMLResponse(fragment(template, everywhere | values), status)


def back(request: Request, to: str, said: str = "") -> Response:
    """On to the page ``to`` after something was done, with a line about it, sealed so that nobody else can write it."""
    path, hash_, place = to.partition("#")
    start = "&" if "?" in path else "?"
    note = start + urlencode({"said": seal_note(house_of(request), said)}) if said else ""
    return RedirectResponse(path + note + hash_ + place, 303)
