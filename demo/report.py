"""What the demo leaves: a table, three answers side by side, ``report.json`` and the learning curves as PNG."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from demo.lesson import GAIN, WINDOW, Exam, Lesson

SHOWN = 3  # replies, before and after
LARGEST_LOSS = 0.7  # nats per token that answers may become less likely under the base model
LEAST_VARIETY = 0.8  # of the distinct-2 at the start


def agent_report(lesson: Lesson, logliks: tuple[float, float]) -> dict[str, Any]:
    """One agent's part of ``report.json``; ``logliks``: of the held-out replies before and after, under the base."""
    before, after = exams(lesson)
    return {
        "heldout_before": round(before.reward, 4),
        "heldout_after": round(after.reward, 4),
        "base_loglik_before": round(logliks[0], 4),
        "base_loglik_after": round(logliks[1], 4),
        "distinct2_before": round(before.distinct2, 4),
        "distinct2_after": round(after.distinct2, 4),
        "version": lesson.versions[-1][1] if lesson.versions else 0,
        "requests": lesson.talker.requests,
        "failed": len(lesson.talker.failures),
        "failures": lesson.talker.failures,
        "interactions": len(lesson.rewards),
        "interactions_to_gain": lesson.interactions_to_gain(),
        "curve": [{"interactions": count, "reward": round(reward, 4)} for count, reward in lesson.curve()],
        "versions": [{"interactions": count, "version": version} for count, version in lesson.versions],
        "replies": [
            {"prompt": old.prompt, "before": old.text, "after": new.text}
            for old, new in zip(before.replies[:SHOWN], after.replies[:SHOWN], strict=True)
        ],
    }


def verdict(report: dict[str, Any], shuffled: bool) -> list[str]:
    """What the demo did not reach, a line each; empty: all."""
    problems = []
    for name, one in report["agents"].items():
        gain = one["heldout_after"] - one["heldout_before"]
        if shuffled:
            if abs(gain) >= GAIN:
                problems.append(f"{name}: with shuffled rewards the held-out reward moved by {gain:+.2f}")
            continue
        if gain < GAIN:
            problems.append(f"{name}: the held-out reward rose by {gain:+.2f}, less than {GAIN}")
        if one["base_loglik_before"] - one["base_loglik_after"] >= LARGEST_LOSS:
            problems.append(f"{name}: its answers became {LARGEST_LOSS} nats per token less likely: it babbles")
        if one["distinct2_after"] <= LEAST_VARIETY * one["distinct2_before"]:
            problems.append(f"{name}: its answers repeat themselves")
        if one["failed"]:
            problems.append(f"{name}: {one['failed']} of {one['requests']} requests failed: {one['failures'][0]}")
    return problems


def write_report(folder: Path, report: dict[str, Any]) -> None:
    """``report.json`` in ``folder``, whole or not at all."""
    partial = folder / "report.json.partial"
    partial.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.replace(folder / "report.json")


def draw_curves(path: Path, report: dict[str, Any]) -> None:
    """Learning curves over interactions, a mark where a new version began to serve."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for name, one in report["agents"].items():
        points = [(point["interactions"], point["reward"]) for point in one["curve"]]
        (line,) = axes.plot(*zip(*points, strict=True), label=f"{name}: mean of the last {WINDOW} rewards")
        known = dict(points)
        marks = [(m["interactions"], known[m["interactions"]]) for m in one["versions"] if m["interactions"] in known]
        if marks:
            axes.plot(*zip(*marks, strict=True), "o", color=line.get_color(), label=f"{name}: a new version serves")
        axes.axhline(one["heldout_before"], color=line.get_color(), linestyle=":", linewidth=1)
        axes.axhline(one["heldout_after"], color=line.get_color(), linestyle="--", linewidth=1)
    axes.set(xlabel="interactions", ylabel="reward", ylim=(-1, 1), title=_title(report))
    axes.legend(loc="lower right", fontsize=8)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def print_report(console: Console, report: dict[str, Any]) -> None:
    """The table, and three answers of each agent before and after."""
    table = Table("", title=_title(report))
    for name in report["agents"]:
        table.add_column(name, justify="right")
    agents = report["agents"].values()

    def before_after(label: str, key: str, form: str) -> None:
        table.add_row(label, *(f"{one[f'{key}_before']:{form}} → {one[f'{key}_after']:{form}}" for one in agents))

    before_after("held-out reward", "heldout", "+.2f")
    table.add_row("gain", *(f"{one['heldout_after'] - one['heldout_before']:+.2f}" for one in agents))
    before_after("log-likelihood under the base model", "base_loglik", ".2f")
    before_after("distinct-2", "distinct2", ".2f")
    table.add_row(f"interactions to +{GAIN}", *(str(one["interactions_to_gain"] or "not reached") for one in agents))
    table.add_row("adapter version", *(f"v{one['version']}" for one in agents))
    for count in ("interactions", "requests", "failed"):
        table.add_row(f"{count} requests" if count == "failed" else count, *(str(one[count]) for one in agents))
    console.print(table)
    for name, one in report["agents"].items():
        replies = Table(title=f"{name}, before and after", show_lines=True)
        for column in ("question", "before", "after"):
            replies.add_column(column, ratio=1)
        for reply in one["replies"]:
            replies.add_row(reply["prompt"], reply["before"], reply["after"])
        console.print(replies)


def _title(report: dict[str, Any]) -> str:
    kind = "shuffled rewards (control)" if report["shuffled"] else "opposite rewards"
    return f"Two agents, {kind}, {report['seconds'] / 60:.1f} minutes"


def exams(lesson: Lesson) -> tuple[Exam, Exam]:
    """Before and after.

    Raises:
        ValueError: if the lesson did not come so far.
    """
    if lesson.before is None or lesson.after is None:
        raise ValueError(f"{lesson.agent} was not examined before and after its lesson")
    return lesson.before, lesson.after
