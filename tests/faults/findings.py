"""What an audit found, by kind."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

KINDS = ("lost", "doubled", "mixed", "leaked", "failed", "trained twice", "not trained", "damaged", "not back", "idle")
SHOWN = 20  # of each kind


@dataclass
class Findings:
    """What was wrong, by kind, and what was seen."""

    wrong: dict[str, list[str]] = field(default_factory=lambda: {kind: [] for kind in KINDS})
    seen: Counter[str] = field(default_factory=Counter)

    def blame(self, kind: str, text: str) -> None:
        self.wrong[kind].append(text)

    @property
    def clean(self) -> bool:
        return not any(self.wrong.values())

    def summary(self) -> dict[str, Any]:
        """As JSON: counts, and the first few of each kind."""
        return {
            "seen": dict(self.seen),
            "wrong": {kind: len(texts) for kind, texts in self.wrong.items()},
            "examples": {kind: texts[:SHOWN] for kind, texts in self.wrong.items() if texts},
        }
