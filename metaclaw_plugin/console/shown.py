"""Text of others, made fit to be shown: nothing in it can act on the page, or hide in it."""

from __future__ import annotations

import re
import time
from datetime import UTC, datetime

from markupsafe import Markup, escape

from metaclaw_plugin.skills.query import BLOCK_CLOSE, BLOCK_OPEN

SHORT = 4_000  # characters of a text that a page shows at first

# What reorders or hides the text around it: bidirectional controls, zero-width characters, tags, surrogates' remains.
_ODD = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2064\u2066-\u206f\ufeff\ufff9-\ufffb"
    "\ud800-\udfff\U000e0000-\U000e007f]"
)


def visible(text: object) -> Markup:
    """``text`` as markup: escaped, with characters that cannot be seen shown by their number."""
    parts: list[Markup] = []
    end = 0
    plain = str(text)
    for match in _ODD.finditer(plain):
        parts.append(escape(plain[end : match.start()]))
        parts.append(Markup('<span class="odd">{}</span>').format(f"U+{ord(match.group()):04X}"))
        end = match.end()
    parts.append(escape(plain[end:]))
    return Markup("").join(parts)


def split_skills(text: str) -> list[tuple[bool, str]]:
    """``text`` in pieces: (whether it is a block that was injected, the piece)."""
    pieces: list[tuple[bool, str]] = []
    rest = text
    while (start := rest.find(BLOCK_OPEN)) >= 0:
        end = rest.find(BLOCK_CLOSE, start)
        if end < 0:
            break
        end += len(BLOCK_CLOSE)
        pieces += [(False, rest[:start]), (True, rest[start:end])]
        rest = rest[end:]
    pieces.append((False, rest))
    return [(injected, piece) for injected, piece in pieces if piece.strip()]


def ago(at: float | None) -> str:
    """How long ago, in words."""
    if at is None:
        return "never"
    seconds = max(0.0, time.time() - at)
    for size, name in ((86_400.0, "d"), (3_600.0, "h"), (60.0, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {name} ago"
    return f"{seconds:.0f} s ago"


def moment(at: float | None) -> str:
    """Date and time, UTC."""
    return "" if at is None else datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def signed(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:+.{digits}f}"
