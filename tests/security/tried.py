"""What was tried, counted, so that a run can say it: printed at the end of every run that attacked anything."""

from __future__ import annotations

from collections import Counter

TRIED: Counter[str] = Counter()


def tried(what: str, times: int = 1) -> None:
    """Note ``times`` more attempts of the kind ``what``."""
    TRIED[what] += times


def listing() -> list[str]:
    """One line for each kind of attempt."""
    return [f"{number:>8,}  {what}" for what, number in sorted(TRIED.items())]
