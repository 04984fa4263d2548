"""What an agent's key may call.

LiteLLM's application answers some 640 routes. Most are for whoever runs it: they change its configuration, show its
state, or speak with the owner's credentials to servers of other makers. LiteLLM asks no role of a key that passed an
authentication of one's own, so these are shut here: an agent's key opens what answers with a model, the list of
models, and MetaClaw's own routes. The owner opens more with ``metaclaw.gateway.open_routes``.

A path alone does not say what answers it: LiteLLM's pass-through routes, and those of the owner's config, match
whatever no route before them does, other methods of an open path too. So the method counts, and the function behind the
route that matched must be of a module below.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

from metaclaw_hooks.errors import InvalidNameError
from metaclaw_hooks.names import parse_version

from metaclaw_plugin.gateway.dialects import dialect_of
from metaclaw_plugin.gateway.identity import MODEL_PREFIX

_OURS = r"/metaclaw/(metrics|v1/.+)"
_RESPONSES = r"(/openai/v1|/v1)?/responses"
_ID = r"[^/]+"
_OPEN = {
    "GET": (_OURS, rf"(/v1)?/models(/{_ID})?", rf"{_RESPONSES}/{_ID}(/input_items)?"),
    "DELETE": (rf"{_RESPONSES}/{_ID}",),
    "POST": (
        _OURS,
        rf"{_RESPONSES}/(compact|input_tokens|{_ID}/cancel)",
        r"/v1/messages/count_tokens",
        r"(/v1)?/(completions|embeddings|moderations)",
        r"/(engines|openai/deployments)/.+/(completions|embeddings)",
        r"(/v1|/openai/deployments/.+)?/images/(generations|edits)",
        r"(/v1)?/audio/(speech|transcriptions)",
        r"(/v1|/v2)?/rerank",
        r"(/v1beta)?/models/.+:(countTokens|generateContent|streamGenerateContent)",
    ),
}
_PATTERNS = {method: re.compile("|".join(patterns), re.DOTALL) for method, patterns in _OPEN.items()}
# Modules whose functions answer the paths above with a model, through LiteLLM's router.
_ANSWERING = (
    "litellm.proxy.proxy_server",
    "litellm.proxy.anthropic_endpoints.endpoints",
    "litellm.proxy.google_endpoints.endpoints",
    "litellm.proxy.image_endpoints.endpoints",
    "litellm.proxy.rerank_endpoints.endpoints",
    "litellm.proxy.response_api_endpoints.endpoints",
)


def is_open(method: str, path: str) -> bool:
    """Whether an agent's key may call ``path``, if one of LiteLLM's routes to models answers it, or one of ours."""
    if method == "POST" and dialect_of(path) is not None:
        return True
    pattern = _PATTERNS.get(method)
    return pattern is not None and pattern.fullmatch(path) is not None


def is_opened(path: str, patterns: Iterable[str]) -> bool:
    """Whether the owner opened ``path``: one of ``patterns``, with ``*``, matches."""
    return any(fnmatchcase(path, pattern) for pattern in patterns)


def answers_agents(endpoint: object) -> bool:
    """Whether ``endpoint``, the function behind the route that matched, asks a model through the router, or is ours."""
    module = getattr(endpoint, "__module__", "")
    return module in _ANSWERING or module.startswith("metaclaw_plugin.")


def names_adapter(model: str) -> bool:
    """Whether ``model`` leads to an agent's adapter: by our prefix, or by vLLM's own name for one, ``agent@vN``.

    The latter passes for a model of the owner's where a deployment has a pattern for its name, such as ``*``.
    """
    return model.startswith(MODEL_PREFIX) or _is_version(model.rpartition("/")[2])


def _is_version(name: str) -> bool:
    try:
        parse_version(name)
    except InvalidNameError:
        return False
    return True


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
