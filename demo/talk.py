"""Talking to an agent as any client would: the official OpenAI client, streaming, its base_url and key changed."""

from __future__ import annotations

import asyncio
import importlib.util
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from openai import APIError, AsyncOpenAI

MAX_TOKENS = 48  # of one answer
AT_ONCE = 8  # streams that one agent has open
DO_NOT_RECORD = {"x-metaclaw-record": "no"}  # held-out questions are never stored, so never trained on


@dataclass(frozen=True)
class Reply:
    """One answer, as the client received it."""

    prompt: str
    text: str
    reward: float  # by the agent's own rule


class Talker:
    """One agent's side of the demo; counts what it sent and what failed."""

    def __init__(self, agent: str, gateway: str, key: str, rule: Path) -> None:
        self.agent = agent
        self.requests = 0
        self.failures: list[str] = []
        self._rule = _load_rule(rule)
        self._client = AsyncOpenAI(base_url=f"{gateway}/v1", api_key=key, max_retries=0, timeout=300)
        self._slots = asyncio.Semaphore(AT_ONCE)

    async def ask_all(
        self, prompts: list[str], *, record: bool, on_reply: Callable[[], None] | None = None
    ) -> list[Reply]:
        """Ask all prompts, ``AT_ONCE`` at a time; the replies of those that did not fail, in order."""
        replies = await asyncio.gather(*(self._ask(prompt, record, on_reply) for prompt in prompts))
        return [reply for reply in replies if reply is not None]

    async def close(self) -> None:
        await self._client.close()

    async def _ask(self, prompt: str, record: bool, on_reply: Callable[[], None] | None) -> Reply | None:
        async with self._slots:
            self.requests += 1
            try:
                reply = await self._stream(prompt, record)
            except APIError as error:
                self.failures.append(f"{type(error).__name__}: {error}")
                return None
            finally:
                if on_reply is not None:
                    on_reply()
        return reply

    async def _stream(self, prompt: str, record: bool) -> Reply:
        raw = await self._client.chat.completions.with_raw_response.create(
            model=f"metaclaw/{self.agent}",
            messages=[{"role": "user", "content": prompt}],
            max_completion_tokens=MAX_TOKENS,
            stream=True,
            extra_headers=None if record else DO_NOT_RECORD,
        )
        pieces = []
        finished = False
        async for chunk in raw.parse():
            for choice in chunk.choices:
                pieces.append(choice.delta.content or "")
                finished = finished or choice.finish_reason is not None
        if not finished:
            raise APIError("the stream ended before the answer did", raw.http_request, body=None)
        text = "".join(pieces)
        return Reply(prompt, text, self._rule(text))


def _load_rule(path: Path) -> Callable[[str], float]:
    """The reward file's own ``score_trace``, asked about a bare text."""
    spec = importlib.util.spec_from_file_location(f"demo_rule_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    score: Callable[[Any], float] = module.score_trace
    return lambda text: score(SimpleNamespace(response_text=text))


async def until(condition: Callable[[], Awaitable[bool]], patience: float, interval: float = 0.5) -> bool:
    """Wait until ``condition`` holds; whether it did within ``patience`` seconds."""
    deadline = asyncio.get_running_loop().time() + patience
    while asyncio.get_running_loop().time() < deadline:
        if await condition():
            return True
        await asyncio.sleep(interval)
    return False
