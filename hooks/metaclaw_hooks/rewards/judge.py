"""A process reward model: another model reads the task, the reply, and what the user or a tool said next.

Each of ``votes`` calls is answered with 1, 0 or -1 in a JSON object; the majority counts, and its share is the
confidence. What cannot be read as such a verdict is no vote; without any vote there is no opinion. As in OpenClaw-RL, a
judge that sees in the next message how the answer should have been also puts that into a hint.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import random
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import httpx

from metaclaw_hooks.errors import HookFailedError
from metaclaw_hooks.hookspecs import hookimpl
from metaclaw_hooks.rewards.judge_prompt import SCHEMA, prompt_messages
from metaclaw_hooks.types import Reward, Trace

logger = logging.getLogger(__name__)

SOURCE = "judge"
_RETRY_STATUS = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
_LONGEST_PAUSE = 20.0  # seconds between tries


@dataclass(frozen=True, slots=True)
class JudgeConfig:
    """How to judge; see the settings of the same names."""

    model: str
    url: str  # root URL of an OpenAI-compatible API, ending in /v1
    api_key: str | None = None
    rubric: str | None = None
    votes: int = 3
    temperature: float = 0.6
    max_tokens: int = 512
    timeout: float = 60.0
    retries: int = 3
    concurrency: int = 8
    daily_calls: int | None = 2000
    daily_cost: float | None = None
    input_price: float = 0.0
    output_price: float = 0.0


@dataclass(frozen=True, slots=True)
class Verdict:
    """One vote."""

    score: int  # -1, 0 or 1
    rationale: str
    hint: str | None


@dataclass(slots=True)
class Spent:
    """Calls made, and what they cost in US dollars."""

    calls: int = 0
    dollars: float = 0.0

    def add(self, other: Spent) -> None:
        self.calls += other.calls
        self.dollars += other.dollars


@dataclass(frozen=True, slots=True)
class Judgement:
    """What came of the votes on one content."""

    key: str  # sha256 of all that the judge was shown and how it was asked
    trace_id: str
    result: Mapping[str, Any]  # value, confidence, rationale, hint


class JudgeBook(Protocol):
    """What the judge keeps between processes. Calls are synchronous and short; they run in a thread."""

    def find(self, key: str, day: str) -> tuple[dict[str, Any] | None, Spent]:
        """An earlier judgement of the same content, and what was spent on ``day`` (ISO, UTC)."""

    def enter(self, day: str, spent: Spent, judgement: Judgement | None) -> None:
        """Add to what was spent, and keep a judgement for as long as the trace that it is about; both or neither."""


class JudgeReward:
    """Asks ``config.model`` about each reply."""

    SCORES_LONE_REPLY = True  # it is better with what followed, but needs it not

    def __init__(self, config: JudgeConfig, book: JudgeBook, transport: httpx.AsyncBaseTransport | None = None) -> None:
        self._config = config
        self._book = book
        self._transport = transport
        self._room = asyncio.Semaphore(config.concurrency)
        self._client: httpx.AsyncClient | None = None
        self._capped_on = ""
        self._plainly = False  # ask without temperature and schema
        self._booked = Spent()  # today, as far as the book was read
        self._unbooked = Spent()  # by calls under way
        tries = config.retries + 1
        self.HOOK_TIMEOUT = 4 * (tries * config.timeout + config.retries * _LONGEST_PAUSE)

    @hookimpl
    async def score_trace(self, trace: Trace, next_trace: Trace | None) -> Reward | None:
        messages = prompt_messages(trace, next_trace, self._config.rubric)
        key, day = self._key(messages), _today()
        known, self._booked = await asyncio.to_thread(self._book.find, key, day)
        if known is None:
            spent = Spent()
            votes = await asyncio.gather(
                *(self._vote(messages, spent) for _ in range(self._config.votes)), return_exceptions=True
            )
            heard = [vote for vote in votes if isinstance(vote, Verdict)]
            known = judgement(heard) if heard else None
            # What came of a bad hour is not kept for ever.
            kept = Judgement(key, trace.id, known) if known and len(heard) == len(votes) else None
            await asyncio.to_thread(self._book.enter, day, spent, kept)
            self._booked_now(day, spent)
            if known is None:
                self._tell_why(votes)
                return None
        return Reward(SOURCE, known["value"], known["rationale"], known["confidence"], known["hint"])

    def _tell_why(self, votes: Sequence[Verdict | BaseException | None]) -> None:
        """Without any vote: the day's limit is no failure, all else is."""
        for vote in votes:
            if isinstance(vote, BaseException):
                raise vote
        if not self._capped():
            raise HookFailedError(f"none of {len(votes)} answers of {self._config.model} was a verdict")

    def _booked_now(self, day: str, spent: Spent) -> None:
        """What is in the book is under way no more."""
        if day == _today():
            self._booked.add(spent)
        self._unbooked.add(Spent(-spent.calls, -spent.dollars))

    def _key(self, messages: list[dict[str, str]]) -> str:
        config = self._config
        content = [config.model, config.url, config.votes, config.temperature, messages]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def _capped(self) -> bool:
        """Whether today's limit is reached; said once a day in the log."""
        config, day = self._config, _today()
        calls = self._booked.calls + self._unbooked.calls
        dollars = self._booked.dollars + self._unbooked.dollars
        reached = (config.daily_calls is not None and calls >= config.daily_calls) or (
            config.daily_cost is not None and dollars >= config.daily_cost
        )
        if reached and self._capped_on != day:
            self._capped_on = day
            logger.warning(
                "the judge has reached its limit for %s (%d calls, %.2f dollars): it has no opinion until tomorrow",
                day,
                calls,
                dollars,
            )
        return reached

    async def _vote(self, messages: list[dict[str, str]], spent: Spent) -> Verdict | None:
        async with self._room:
            for attempt in range(self._config.retries + 1):
                if self._capped():
                    return None
                try:
                    answer = await self._ask(messages, spent)
                except httpx.HTTPError as error:
                    pause, reason = 0.0, type(error).__name__
                else:
                    if answer.is_success:
                        return self._read(answer, spent)
                    if answer.status_code not in _RETRY_STATUS:
                        raise HookFailedError(
                            f"{self._config.model} answered {answer.status_code}; check the judge's model, url and key"
                        )
                    pause, reason = _retry_after(answer), f"status {answer.status_code}"
                if attempt < self._config.retries:
                    backoff = min(_LONGEST_PAUSE, 0.5 * 2**attempt) * random.uniform(0.5, 1.0)
                    await asyncio.sleep(min(_LONGEST_PAUSE, max(pause, backoff)))
            tries = self._config.retries + 1
            raise HookFailedError(f"{self._config.model} did not answer ({tries} tries, last: {reason})")

    async def _ask(self, messages: list[dict[str, str]], spent: Spent) -> httpx.Response:
        """Ask once. Models differ in what may be set: after a 400 the judge asks without temperature and schema."""
        config = self._config
        asked = {"model": config.model, "messages": messages, "max_tokens": config.max_tokens}
        answer = await self._post(asked if self._plainly else asked | self._wishes(), spent)
        if answer.status_code == 400 and not self._plainly:
            answer = await self._post(asked, spent)
            if answer.is_success:
                self._plainly = True
                logger.info("%s takes no temperature or no schema; the judge asks it without", config.model)
        return answer

    def _wishes(self) -> dict[str, Any]:
        schema = {"name": "verdict", "schema": SCHEMA, "strict": True}
        form = {"type": "json_schema", "json_schema": schema}
        return {"temperature": self._config.temperature, "response_format": form}

    async def _post(self, body: Mapping[str, Any], spent: Spent) -> httpx.Response:
        if self._client is None:  # made on the event loop that it is used on
            self._client = httpx.AsyncClient(transport=self._transport, trust_env=False)
        config = self._config
        self._charge(spent, Spent(calls=1))
        return await self._client.post(
            f"{config.url.rstrip('/')}/chat/completions",
            headers={"authorization": f"Bearer {config.api_key}"} if config.api_key else {},
            timeout=config.timeout,
            json=body,
        )

    def _read(self, answer: httpx.Response, spent: Spent) -> Verdict | None:
        try:
            data = answer.json()
            text = data["choices"][0]["message"]["content"] or ""
        except (ValueError, LookupError, TypeError):
            return None
        self._charge(spent, Spent(dollars=self._cost(answer.headers, data.get("usage"))))
        return read_verdict(text)

    def _charge(self, spent: Spent, more: Spent) -> None:
        spent.add(more)
        self._unbooked.add(more)

    def _cost(self, headers: Mapping[str, str], usage: Any) -> float:
        """What LiteLLM says that the call cost, else tokens times the configured prices; US dollars."""
        try:
            told = float(headers.get("x-litellm-response-cost", ""))
        except ValueError:
            told = 0.0
        if told > 0:
            return told
        if not isinstance(usage, Mapping):
            return 0.0
        tokens = [usage.get(name) or 0 for name in ("prompt_tokens", "completion_tokens")]
        return float(tokens[0] * self._config.input_price + tokens[1] * self._config.output_price) / 1e6


def read_verdict(text: str) -> Verdict | None:
    """The verdict in a model's answer: the last JSON object that holds a score of -1, 0 or 1; ``None`` for prose.

    An object inside of another, or quoted in one of its texts, is not the model's verdict.
    """
    for data in reversed(list(_objects(text))):
        score = data.get("score")
        if isinstance(score, int | float) and not isinstance(score, bool) and score in (-1, 0, 1):
            hint = data.get("hint")
            told = hint.strip()[:1000] if isinstance(hint, str) else ""
            return Verdict(int(score), str(data.get("rationale") or "")[:1000], told or None)
    return None


def _objects(text: str) -> Iterator[dict[str, Any]]:
    decoder, start = json.JSONDecoder(strict=False), text.find("{")
    while start >= 0:
        try:
            found, end = decoder.raw_decode(text, start)
        except (ValueError, RecursionError):
            end = start + 1
        else:
            yield found
        start = text.find("{", end)


def judgement(votes: list[Verdict]) -> dict[str, Any]:
    """The majority's value, rationale and hint, and its share as confidence; a tie is the mean, held half as firmly."""
    counts = Counter(vote.score for vote in votes).most_common()
    leaders = [score for score, count in counts if count == counts[0][1]]
    value = sum(leaders) / len(leaders)
    share = counts[0][1] / len(votes)
    chosen = next(vote for vote in votes if vote.score in leaders)
    hints = [vote.hint for vote in votes if vote.hint and vote.score in leaders]
    return {
        "value": float(value),
        "confidence": share if len(leaders) == 1 else share / 2,
        "rationale": chosen.rationale,
        "hint": max(hints, key=len) if hints else None,
    }


def _retry_after(answer: httpx.Response) -> float:
    try:
        return max(0.0, float(answer.headers.get("retry-after", "0")))
    except ValueError:
        return 0.0


def _today() -> str:
    return time.strftime("%Y-%m-%d", time.gmtime())
