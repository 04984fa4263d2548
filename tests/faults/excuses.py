"""Which failures a fault excuses: of what kind, when, saying what, and how many. All others are found wrong."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tests.faults.clients import CLOSED, CUT, ERROR_EVENT, REFUSED, Asked
from tests.faults.findings import Findings

SLACK = 2.0  # seconds that a client may take to notice
SAYING = 10.0  # seconds that a busy gateway may take to say that vLLM was away
ANYTHING = ""
# What LiteLLM makes of a vLLM that is away: an error of its own in place of the answer, or in the middle of a stream,
# in which it says how the connection failed.
_BROKEN = (
    r"Hosted_vllmException - (Cannot connect to host|Response payload is not completed|Server disconnected"
    r"|Connection (error|reset|closed|lost)|\[Errno 104\])"
)
UPSTREAM_AWAY: Mapping[str, str] = {"500": _BROKEN, ERROR_EVENT: _BROKEN}
# A process that was killed says nothing: what it held is cut off, or closed before an answer.
KILLED: Mapping[str, str] = {CLOSED: ANYTHING, CUT: ANYTHING}
# One that was told to stop ends what it has begun; what it has not read yet, it closes.
STOPPED: Mapping[str, str] = {CLOSED: ANYTHING, REFUSED: ANYTHING}
STARTING: Mapping[str, str] = {REFUSED: ANYTHING}


@dataclass(frozen=True)
class Excuse:
    """Requests that failed between ``begin`` and ``end`` (monotonic) may have done so by ``why``."""

    why: str
    begin: float
    end: float
    allows: Mapping[str, str]  # kind of failure -> what its text must match
    most: int | None = None  # how many at most; None: any number

    def covers(self, one: Asked) -> bool:
        """Whether ``one`` may have failed by this: while it went on, and in a way in which it makes requests fail."""
        said = self.allows.get(one.failure)
        if said is None or not self.begin <= one.ended <= self.end:
            return False
        return re.search(said, one.error) is not None


@dataclass
class Failures:
    """What became of the requests that failed."""

    by_cause: Counter[tuple[str, str]] = field(default_factory=Counter)  # why, kind of failure -> how many
    each: list[dict[str, Any]] = field(default_factory=list)


def check_failures(asked: Iterable[Asked], excuses: Iterable[Excuse], findings: Findings) -> Failures:
    """Blame each request that failed without a fault that makes requests fail so; itemise the others."""
    narrow = sorted(excuses, key=lambda excuse: (excuse.most is None, excuse.end))  # what allows few is used up first
    used: Counter[int] = Counter()
    found = Failures()
    for one in sorted(asked, key=lambda one: one.ended):
        findings.seen["requests"] += 1
        if one.whole:
            continue
        cause = next(
            (i for i, excuse in enumerate(narrow) if excuse.covers(one) and used[i] < _most(excuse)), None
        )  # fmt: skip
        why = "unexcused" if cause is None else narrow[cause].why
        if cause is None:
            findings.blame("failed", _sentence(one))
        else:
            used[cause] += 1
        found.by_cause[why, one.failure] += 1
        seconds = round(one.ended - one.began, 2)
        found.each.append(
            {"nonce": one.nonce, "at": round(one.ended, 2), "seconds": seconds, "why": why, "kind": one.failure,
             "said": one.error[:160]}
        )  # fmt: skip
    return found


def _most(excuse: Excuse) -> float:
    return float("inf") if excuse.most is None else excuse.most


def _sentence(one: Asked) -> str:
    return f"{one.nonce} after {one.ended - one.began:.2f} s: {one.failure}: {one.error}"
