"""A conversation that tries to act on the pages that show it."""

from __future__ import annotations

from typing import Any

from metaclaw_plugin.skills.query import BLOCK_CLOSE, BLOCK_OPEN
from tests.store_cases import a_trace

HOSTILE = (
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "\"'><svg/onload=alert(1)>",
    "</pre></main><iframe src=//evil.test></iframe>",
    "{{ 7 * 7 }}{% raw %}",
    "javascript:alert(1)",
    "<!-- -->]]><style>*{display:none}</style>",
    "<div hx-get='/sign-out' hx-trigger='load'>",
    "<meta http-equiv=refresh content='0;url=//evil.test'>",
    "a\u202eb\u2066c\u200bd\ufeffe\U000e0041f",
    "\x00\x01\x08\x0b\x1b[31m\x7f\x9b",
    "\ud800 half a pair",
    f"{BLOCK_OPEN}<b>{BLOCK_CLOSE}",
    f"{BLOCK_OPEN}never closed",
    "مرحبا بالعالم \u05e9\u05dc\u05d5\u05dd",
)


def hostile_trace(**changes: Any) -> Any:
    """A trace every free text of which is hostile."""
    text = "\n".join(HOSTILE)
    return a_trace(
        id="tr-h",
        session="ses-h",
        messages=(
            {"role": text[:80], "content": text},
            {"role": "user", "content": [{"type": text, "text": text}, {"type": text[:30], "image_url": text}, text]},
            {"role": "tool", "content": text, "tool_call_id": text},
        ),
        tools=({"type": "function", "function": {"name": text}}, {"name": text}, {"odd": True}),
        response={
            "role": "assistant",
            "content": text,
            "tool_calls": [{"function": {"name": text, "arguments": text}}],
        },
        reason=text.replace("\x00", "").replace("\ud800", "")[:400],
        trainable=False,
        model="<i>x</i>",
        **changes,
    )
