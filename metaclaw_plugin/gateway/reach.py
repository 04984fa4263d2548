"""What an agent's key may call.

LiteLLM's application answers some 640 routes. Most are for whoever runs it: they change its configuration, show its
state, or speak with the owner's credentials to servers of other makers. LiteLLM asks no role of a key that passed an
authentication of one's own, so these are shut here: an agent's key opens what answers with a model, the list of
models, and MetaClaw's own routes. The owner opens more with ``metaclaw.gateway.open_routes``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

from metaclaw_plugin.gateway.dialects import dialect_of
from metaclaw_plugin.gateway.identity import MODEL_PREFIX

_ID = r"[^/]+"
_OPEN = re.compile(
    "|".join(
        (
            r"/metaclaw/.+",
            r"(/v1)?/models(/.+)?",
            r"(/openai)?(/v1)?/responses/(compact|input_tokens)",
            rf"(/openai)?(/v1)?/responses/{_ID}(/input_items|/cancel)?",
            r"/v1/messages/count_tokens",
            r"(/v1|/engines/.+|/openai/deployments/.+)?/(completions|embeddings|moderations)",
            r"(/v1|/openai/deployments/.+)?/images/(generations|edits|variations)",
            r"(/v1)?/audio/(speech|transcriptions|translations)",
            r"(/v1|/v2)?/rerank",
            r"(/v1beta)?/models/.+:(countTokens|generateContent|streamGenerateContent)",
        )
    ),
    re.DOTALL,
)


def is_open(route: str, more: Iterable[str] = ()) -> bool:
    """Whether an agent's key may call ``route``, a path; ``more``: patterns of the owner's, with ``*``."""
    if dialect_of(route) is not None or _OPEN.fullmatch(route):
        return True
    return any(fnmatchcase(route, pattern) for pattern in more)


def forbidden_model(data: Mapping[str, Any], fallbacks: Iterable[str], routed: bool) -> str | None:
    """Why a request may not have the model that it names; ``None``: it may.

    ``routed``: an agent was found for it, which decides about ``model`` anew, so that only ``fallbacks`` are looked at.
    Names below ``metaclaw/`` lead to agents' adapters, so no request may choose one past its agent (law 4).
    """
    asked = data.get("model")
    if not routed and isinstance(asked, str) and asked.startswith(MODEL_PREFIX):
        return f"{asked[:80]!r} answers on /v1/chat/completions, /v1/messages and /v1/responses alone"
    for name in fallbacks:
        if name.startswith(MODEL_PREFIX):
            return f"{name[:80]!r} cannot be a fallback: which adapter answers is decided by the key and its agent"
    return None
