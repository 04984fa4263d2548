"""Names that may become paths: an agent is a slug, an adapter version is ``agent@vN``."""

from __future__ import annotations

import re

from metaclaw_hooks.errors import InvalidNameError

_SLUG = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")
_VERSION = re.compile(r"(?P<agent>[a-z0-9][a-z0-9-]{0,62})@v(?P<number>[1-9][0-9]{0,8})")


def slug(name: str, what: str = "agent") -> str:
    """Return ``name`` if it is a slug.

    Raises:
        InvalidNameError: if it is not; nothing may be made of such a name.
    """
    if not isinstance(name, str) or _SLUG.fullmatch(name) is None:
        raise InvalidNameError(
            f"{str(name)[:80]!r} is no valid {what} name: use 1 to 63 of a-z, 0-9 and '-', not starting with '-'"
        )
    return name


def version_name(agent: str, number: int) -> str:
    """The name under which vLLM serves version ``number`` (1 or more) of ``agent``."""
    if number < 1:
        raise InvalidNameError(f"adapter version {number} of {agent!r}: versions count from 1 (0 is the base model)")
    return f"{slug(agent)}@v{number}"


def parse_version(name: str) -> tuple[str, int]:
    """``"agent@v8"`` -> ``("agent", 8)``.

    Raises:
        InvalidNameError: if the name is not of that form.
    """
    match = _VERSION.fullmatch(name)
    if match is None:
        raise InvalidNameError(f"{name[:80]!r} is no adapter version: the form is agent@vN, with N from 1")
    return match["agent"], int(match["number"])
