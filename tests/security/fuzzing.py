"""Requests made up from OpenAPI documents and by hypothesis, sent to running processes, and what may come back."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode

from tests.security.house import LONG
from tests.security.tried import tried

SEED = int(os.environ.get("METACLAW_TEST_SEED", "20261122"))
TOTAL = 20_000 if LONG else 400  # requests of all fuzz tests together, about
# A status past 500 is a fault, unless it is 503 and names what is away: in the error's type, or in its words.
AWAY = (
    "store_unavailable",
    "the store does not answer",
    "vllm_unavailable",
    "vllm_refused",
    "did not answer",
    "could not be fetched from the trainer",
)
MOST_WAIT = 0.01  # seconds that a request may ask to wait for
TIMEOUT = 60.0  # seconds; a reply that takes longer is a fault


@dataclass
class Fuzzer:
    """Sends requests to one process and notes every reply that may not be."""

    name: str
    url: str
    headers: dict[str, str]
    statuses: Counter[int] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    session: requests.Session = field(default_factory=requests.Session)
    pardon: Callable[[requests.PreparedRequest, requests.Response], bool] | None = None  # a 500 that is not ours

    def send(self, method: str, url: str, **more: Any) -> None:
        """Send one request; replies that are a fault are noted, with what they were asked."""
        more["headers"] = {**(more.pop("headers", None) or {}), **self.headers}
        try:
            request = self.session.prepare_request(requests.Request(method, url, **more))
        except (ValueError, TypeError, UnicodeError, requests.RequestException):
            return  # cannot be put on a wire: no client could send it
        try:
            reply = self.session.send(request, timeout=TIMEOUT, allow_redirects=False)
        except requests.RequestException as error:
            self._note(f"{method} {request.url!r:.300}: {error!r:.300} to {request.body!r:.300}")
            return
        tried(f"fuzzed requests to the {self.name}")
        self.statuses[reply.status_code] += 1
        self.session.cookies.clear()
        away = reply.status_code == 503 and any(words in reply.text for words in AWAY)
        broken = reply.status_code >= 500 and not away
        broken = broken and not (self.pardon is not None and self.pardon(request, reply))
        if LONG and self.sent % 500 == 0:
            print(f"{self.name}: {self.sent:,} requests, {len(self.faults)} faults", flush=True)
        if broken or "Traceback (most recent call last)" in reply.text:
            self.faults.append(
                f"{method} {request.url}: {reply.status_code} {reply.text:.200} to {request.body!r:.600}"
            )

    def _note(self, fault: str) -> None:
        self.faults.append(fault)
        print(fault, flush=True)  # a run that is ended by its time limit has said so

    def case(self, case: schemathesis.Case) -> None:
        """Send what schemathesis made up."""
        if isinstance(case.query, dict) and isinstance(case.query.get("wait"), int | float):
            case.query["wait"] = min(case.query["wait"], MOST_WAIT)
        try:
            asked = case.as_transport_kwargs(base_url=self.url, headers=self.headers)
        except (ValueError, TypeError, UnicodeError):
            return
        asked.pop("cookies", None)
        self.send(asked.pop("method"), asked.pop("url"), **asked)

    @property
    def sent(self) -> int:
        return sum(self.statuses.values())


def operations(document: dict[str, Any]) -> Iterator[schemathesis.APIOperation]:
    """The operations of an OpenAPI document, those of which nothing can be varied left out."""
    for methods in document["paths"].values():
        for described in methods.values():
            described.pop("security", None)  # keys have tests of their own; here every request gets past them
    for found in schemathesis.openapi.from_dict(document).get_all_operations():
        operation = found.ok()
        if operation.body or operation.query or operation.path_parameters:
            yield operation


def from_document(fuzzer: Fuzzer, document: dict[str, Any], total: int) -> None:
    """``total`` requests, about: half keep to the document, half break it."""
    chosen = list(operations(document))
    each = max(1, total // (2 * len(chosen)))
    for operation in chosen:
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
            drive(operation.as_strategy(generation_mode=mode), each, fuzzer.case)


def drive(strategy: st.SearchStrategy[Any], number: int, use: Callable[[Any], None]) -> None:
    """``use`` up to ``number`` values of ``strategy``, the same ones for the same ``SEED``."""

    @seed(SEED)
    @settings(
        max_examples=number,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],
    )
    @given(strategy)
    def run(value: Any) -> None:
        use(value)

    try:
        run()
    except Unsatisfiable:
        return  # there is no request that breaks this document


# Text that has broken programs before, and any other.
TEXTS = st.one_of(
    st.text(max_size=60),
    st.sampled_from(
        [
            "",
            "\x00",
            "\ud800",
            "../../etc/passwd",
            "metaclaw/beta@v1",
            "%00",
            "{{7*7}}",
            "'; --",
            "\u202e",
            "x" * 5000,
            "NaN",
        ]
    ),
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=12,
)


def mutated(good: dict[str, Any], more: tuple[str, ...]) -> st.SearchStrategy[dict[str, Any]]:
    """``good`` with up to three of its fields, or of ``more``, left out or set to anything."""
    change = st.tuples(st.sampled_from((*good, *more)), st.just(...) | JSON)

    def apply(changes: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(good)
        for name, value in changes:
            if value is ...:
                made.pop(name, None)
            else:
                made[name] = value
        return made

    return st.lists(change, min_size=1, max_size=3).map(apply)
