"""The numbers behind an agent's charts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from metaclaw_plugin.console.figures import mean_and_half
from metaclaw_plugin.store.adapters import VersionRecord
from metaclaw_plugin.store.recent import History

POINTS = 60  # of the learning curve
LEAST = 5  # rewards that make a point
TRAINING = ("loss", "kl_base", "gap", "entropy", "tokens_per_second", "reward")


def learning_curve(history: History, versions: Sequence[VersionRecord]) -> dict[str, Any]:
    """Mean rewards of equally many replies each, with the 95 % interval of each mean, and when versions changed.

    Lists of one length: ``at`` (Unix seconds), ``mean``, ``low``, ``high``, ``n``; a bound is null below five rewards.
    """
    points = history.points
    groups = max(1, min(POINTS, len(points) // LEAST))
    curve: dict[str, list[Any]] = {name: [] for name in ("at", "mean", "low", "high", "n")}
    for group in range(groups if points else 0):
        part = points[group * len(points) // groups : (group + 1) * len(points) // groups]
        mean, half = mean_and_half([reward for _, reward in part])
        curve["at"].append(round(sum(at for at, _ in part) / len(part), 3))
        curve["mean"].append(mean)
        curve["low"].append(None if mean is None or half is None else max(-1.0, mean - half))
        curve["high"].append(None if mean is None or half is None else min(1.0, mean + half))
        curve["n"].append(len(part))
    marks = [
        {"at": record.decided_at, "version": record.version.number}
        for record in versions
        if record.decided_at is not None and (record.decision or {}).get("accepted")
    ]
    return {**curve, "marks": marks, "sampled": history.sampled, "replies": len(points)}


def training_curves(versions: Sequence[VersionRecord]) -> dict[str, Any]:
    """For each training step that made a version: its number, and its figures; null where there is none."""
    ordered = sorted(versions, key=lambda record: record.version.number)
    metrics = [record.version.metrics for record in ordered]
    return {
        "version": [record.version.number for record in ordered],
        "step": [record.version.step for record in ordered],
        **{name: [values.get(name) for values in metrics] for name in TRAINING},
    }


def lineage(number: int, parents: Mapping[int, int]) -> list[int]:
    """What version ``number`` was trained from, newest first, to 0 (the base model) or as far as ``parents`` go."""
    found: list[int] = []
    while number in parents and parents[number] < number:
        number = parents[number]
        found.append(number)
    return found
