"""Short questions to the processes, asked all at once. ``http.client`` because it is imported in no time."""

from __future__ import annotations

import http.client
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

TIMEOUT = 0.25  # seconds


@dataclass(frozen=True)
class Question:
    """A GET of ``path`` at ``url``."""

    url: str
    path: str
    key: str | None = None


@dataclass(frozen=True)
class Answer:
    """What came back; ``problem`` says why nothing usable did."""

    status: int | None = None
    body: Any = None
    problem: str | None = None

    @property
    def ok(self) -> bool:
        return self.status == 200


def ask_all(questions: Mapping[str, Question], timeout: float = TIMEOUT) -> dict[str, Answer]:
    """Ask all questions at the same time; each answer is there after ``timeout`` seconds or so, whatever it is."""
    if not questions:
        return {}
    with ThreadPoolExecutor(len(questions)) as pool:
        answers: Sequence[Answer] = list(pool.map(lambda question: ask(question, timeout), questions.values()))
    return dict(zip(questions, answers, strict=True))


def ask(question: Question, timeout: float = TIMEOUT) -> Answer:
    """One question. Never raises for what the network or the other side does."""
    parts = urlsplit(question.url)
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    connection = kind(parts.hostname or "127.0.0.1", parts.port, timeout=timeout)
    headers = {"Authorization": f"Bearer {question.key}"} if question.key else {}
    try:
        connection.request("GET", parts.path.rstrip("/") + question.path, headers=headers)
        response = connection.getresponse()
        body = response.read(4 * 2**20)
    except TimeoutError:
        return Answer(problem="does not answer in time")
    except ConnectionRefusedError:
        return Answer(problem="not running")
    except (OSError, http.client.HTTPException) as error:
        return Answer(problem=str(error) or type(error).__name__)
    finally:
        connection.close()
    if response.status != 200:
        return Answer(response.status, problem=f"answers with status {response.status}")
    try:
        return Answer(200, json.loads(body) if body else None)
    except ValueError:
        return Answer(200)
