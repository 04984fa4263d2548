"""What is missing from the store after a fault, against what the gateway says that it lost."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from prometheus_client.mmap_dict import MmapedDict

from tests.faults.findings import Findings

LOST, LATE, UNRECORDED = "traces_lost", "commits_late", "requests_unrecorded"
LOSSES = (LOST, LATE, UNRECORDED)


@dataclass(frozen=True)
class Account:
    """Of the answers that were received whole during one fault: what has no trace, and what was counted."""

    name: str
    traces: int  # whose trace id the client was told, and whose trace is not stored
    bare: int  # that named no trace, since the store did not answer before the call
    failed: int  # requests that failed meanwhile; what they were counted as is nobody's loss
    counted: Mapping[str, int]  # how much each counter rose
    died_with: int = 0  # answers that were counted as late by processes that were killed before they could store them

    @property
    def missing(self) -> int:
        return self.traces + self.bare

    @property
    def balanced(self) -> bool:
        """Whether each missing one is counted as such, and nothing is counted that is not missing.

        Late is not lost: it counts only for what a process that was killed took along. A request that failed may have
        been counted before it did.
        """
        lost, unrecorded = self.counted.get(LOST, 0), self.counted.get(UNRECORDED, 0)
        traces = lost - self.failed <= self.traces <= lost + self.died_with
        return traces and unrecorded - self.failed <= self.bare <= unrecorded

    def check(self, may_cost: bool, findings: Findings) -> None:
        """``may_cost``: this fault may cost records."""
        if not may_cost and self.missing:
            findings.blame("lost", f"{self.name}: {self.missing} answers have no trace, and the store was well")
        elif may_cost and not self.balanced:
            findings.blame(
                "lost",
                f"{self.name}: {self.traces} traces and {self.bare} whole requests are missing; counted are "
                f"{self.counted.get(LOST, 0)} lost and {self.counted.get(UNRECORDED, 0)} unrecorded, {self.died_with} "
                f"were late with those killed, {self.failed} requests failed",
            )


def late_of(folder: Path, pids: Iterable[int]) -> int:
    """Answers that the gateway workers ``pids`` counted as late, by the counters that they left in ``folder``."""
    return int(sum(value for pid in pids for key, value in _values(folder / f"counter_{pid}.db") if f'"{LATE}"' in key))


def has_answered(folder: Path, pid: int) -> bool:
    """Whether the gateway worker ``pid`` has stored the trace of an answer since it started: then it is up."""
    return any("metaclaw_commit_seconds" in key for key, _ in _values(folder / f"histogram_{pid}.db"))


def _values(file: Path) -> list[tuple[str, float]]:
    """What a process counted, as prometheus_client keeps it: name with labels, and value; nothing before it counts."""
    if not file.exists():
        return []
    found = MmapedDict.read_all_values_from_file(str(file))  # type: ignore[no-untyped-call]
    return [(key, value) for key, value, *_ in found]
