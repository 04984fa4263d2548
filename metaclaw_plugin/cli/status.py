"""``metaclaw status``: what runs, what serves, and why nothing is training."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

import typer

from metaclaw_plugin.cli.options import AsJson, Config

if TYPE_CHECKING:
    from metaclaw_plugin.status.collect import Status

# Counters that grow when all is well; the others are worth a line.
EVERYDAY = {"stored_bytes", "hook_calls", "hook_microseconds", "samples_forwarded", "feedback_applied"}

app = typer.Typer(rich_markup_mode=None)


@app.command()
def status(config: Config = None, as_json: AsJson = False) -> None:
    """Show the processes, each agent's serving version and backlog, and why nothing is training.

    Works whatever is down. WAITING are traces that are not scored or not forwarded yet; QUEUED are samples at the
    trainer, of as many as make a batch.
    """
    from dataclasses import asdict

    from metaclaw_plugin.settings import find_config, load_settings
    from metaclaw_plugin.status.collect import collect

    found = collect(load_settings(find_config(config)))
    typer.echo(json.dumps(asdict(found), indent=2) if as_json else render(found))


def render(status: Status) -> str:
    """The status as text, in aligned columns."""
    parts = [f"MetaClaw {'runs' if status.running else 'is not started (`metaclaw start`)'}; data in {status.home}", ""]
    rows: list[Sequence[str]] = [("PROCESS", "STATE", "FOR", "WHERE", "")]
    for process in status.processes:
        restarts = f" (started again {process.restarts} times)" if process.restarts else ""
        since = "" if process.seconds is None else duration(process.seconds)
        rows.append((process.name, process.state, since, process.where, process.detail + restarts))
    parts += columns(rows)
    if status.agents:
        rows = [("AGENT", "MODE", "SERVES", "TRACES", "WAITING", "QUEUED", "TRAINED", "WHY IS NOTHING TRAINING?")]
        for agent in status.agents:
            queued = "-" if agent.queued is None else f"{agent.queued}/{agent.batch_size}"
            serves = f"v{agent.version}" if agent.version else "base"
            figures = (str(agent.traces), str(agent.waiting), queued, str(agent.trained))
            rows.append((agent.name, agent.mode, serves, *figures, agent.why))
        parts += ["", *columns(rows)]
    else:
        parts += ["", "No agents yet: `metaclaw agents add NAME` makes one and prints its key."]
    told = [(name, label, str(value)) for name, label, value in status.counters if name not in EVERYDAY]
    if told:
        parts += ["", *columns([("WENT WRONG", "FOR", "TIMES"), *told])]
    parts += [f"problem: {problem}" for problem in status.problems]
    return "\n".join(parts)


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of equal length as aligned lines."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def duration(seconds: float) -> str:
    """``93 s``, ``12 min``, ``5 h``, ``3 d``."""
    for size, unit in ((86400, "d"), (3600, "h"), (120, "min")):
        if seconds >= size:
            return f"{seconds / (60 if unit == 'min' else size):.0f} {unit}"
    return f"{seconds:.0f} s"
