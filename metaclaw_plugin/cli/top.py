"""``metaclaw top``: agents, rewards, versions and queues, live in the terminal."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated

import typer

from metaclaw_plugin.cli.options import Config

if TYPE_CHECKING:
    from rich.console import Group

    from metaclaw_plugin.settings import Settings

app = typer.Typer(rich_markup_mode=None)


@app.command()
def top(
    interval: Annotated[float, typer.Option(min=0.2, help="Seconds between two looks.")] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="Look once and end.")] = False,
    config: Config = None,
) -> None:
    """Watch processes and agents live: requests, rewards over time, serving version, queues. Ctrl-C ends it.

    The curve is the mean reward of the newest scored replies, oldest left, in eight steps from -1 to 1.
    """
    from rich.console import Console
    from rich.live import Live

    from metaclaw_plugin.settings import find_config, load_settings

    settings = load_settings(find_config(config))
    console = Console()
    if once:
        console.print(picture(settings))
        return
    with Live(picture(settings), console=console, screen=console.is_terminal, auto_refresh=False) as live:
        while True:
            time.sleep(interval)
            live.update(picture(settings), refresh=True)


def picture(settings: Settings) -> Group:
    """Everything at one moment, as two tables."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    from metaclaw_plugin.cli.status import EVERYDAY, duration
    from metaclaw_plugin.status.activity import read_activity, sparkline
    from metaclaw_plugin.status.collect import collect

    status = collect(settings)
    activity = read_activity(settings.store_url, time.time())
    processes = Table("process", "state", "for", "restarts", "", box=None, pad_edge=False)
    for process in status.processes:
        colour = {"ready": "green", "starting": "yellow"}.get(process.state, "red")
        since = "" if process.seconds is None else duration(process.seconds)
        processes.add_row(
            process.name, Text(process.state, colour), since, str(process.restarts or ""), Text(process.detail)
        )
    agents = Table(
        *("agent", "mode", "serves", "req/min", "reward", "curve", "waiting", "queued", "trained", "why not training"),
        box=None,
        pad_edge=False,
    )
    for agent in status.agents:
        seen = activity.get(agent.name)
        agents.add_row(
            Text(agent.name),
            agent.mode,
            f"v{agent.version}" if agent.version else "base",
            str(seen.last_minute) if seen else "0",
            f"{seen.mean:+.2f}" if seen and seen.mean is not None else "-",
            sparkline(seen.rewards) if seen else "",
            str(agent.waiting),
            "-" if agent.queued is None else f"{agent.queued}/{agent.batch_size}",
            str(agent.trained),
            Text(agent.why),
        )
    wrong = [f"{name} {label}: {value}" for name, label, value in status.counters if name not in EVERYDAY]
    notes = Text("\n".join([*wrong, *status.problems]), "yellow")
    title = Text(f"MetaClaw, {time.strftime('%H:%M:%S')}, {status.home}", "bold")
    return Group(title, "", processes, "", agents, "", notes)
