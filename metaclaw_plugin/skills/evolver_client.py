"""The model that writes skills: any endpoint that speaks OpenAI's chat completions, our own gateway by default."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from typing import Any

import httpx
from metaclaw_hooks.types import message_text

from metaclaw_plugin.errors import SkillError
from metaclaw_plugin.gateway.identity import internal_key
from metaclaw_plugin.settings import Settings

_MAX_REPLY = 2_000_000  # bytes


async def ask_evolver(http: httpx.AsyncClient, settings: Settings, messages: Sequence[Mapping[str, Any]]) -> str:
    """The evolver's answer to ``messages``.

    Raises:
        SkillError: if it does not answer in time, or not with a chat completion.
    """
    evolution = settings.skills.evolution
    url, key = _endpoint(settings)
    body = {
        "model": evolution.model,
        "messages": list(messages),
        "temperature": 0.2,
        "max_tokens": evolution.max_tokens,
    }
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        async with (
            asyncio.timeout(evolution.timeout),
            http.stream("POST", f"{url}/chat/completions", json=body, headers=headers, timeout=None) as reply,
        ):
            data = await _read(reply)
            if reply.status_code != 200:
                detail = data[:300].decode("utf-8", "replace")
                raise SkillError(f"the evolver {evolution.model} at {url} answered {reply.status_code}: {detail}")
    except TimeoutError as error:
        raise SkillError(f"the evolver {evolution.model} did not answer in {evolution.timeout:g} s") from error
    except httpx.HTTPError as error:
        raise SkillError(f"the evolver {evolution.model} at {url} cannot be reached: {error!r}") from error
    try:
        text = message_text(json.loads(data)["choices"][0]["message"])
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise SkillError(f"the evolver {evolution.model} sent no chat completion") from error
    if not text.strip():
        raise SkillError(f"the evolver {evolution.model} sent an empty answer")
    return text


def _endpoint(settings: Settings) -> tuple[str, str | None]:
    evolution = settings.skills.evolution
    if evolution.url is not None:
        return evolution.url.rstrip("/"), evolution.api_key
    host = "127.0.0.1" if settings.gateway.host in ("0.0.0.0", "::", "") else settings.gateway.host
    return f"http://{host}:{settings.gateway.port}/v1", internal_key(settings.home)


async def _read(reply: httpx.Response) -> bytes:
    data = bytearray()
    async for chunk in reply.aiter_bytes():
        data += chunk
        if len(data) > _MAX_REPLY:
            raise SkillError(f"the evolver sent more than {_MAX_REPLY:,} bytes")
    return bytes(data)
