"""``metaclaw hooks``: which plugins there are, what they did, and what they would say."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from metaclaw_plugin.cli.options import AsJson, Config

if TYPE_CHECKING:
    from pathlib import Path

    from metaclaw_hooks.wire import HooksReply
    from sqlalchemy.engine import Engine

    from metaclaw_plugin.settings import RlSettings, Settings

TRAINER_HOOKS = ("accept_sample", "compute_advantages", "register_losses", "after_step")
TRAINER_PATIENCE = 3.0  # seconds

app = typer.Typer(rich_markup_mode=None, no_args_is_help=True)


@app.command("list")
def list_command(config: Config = None, as_json: AsJson = False) -> None:
    """List the plugins with their hooks, calls, failures and time.

    Plugins are built in, come with an installed package (entry points of the group `metaclaw`), or are plain .py files
    in the folder of hooks: FOLDER/x.py for every agent, FOLDER/AGENT/x.py for one. What cannot be loaded is listed with
    the reason. Calls, failures and time are those of all gateways and workers so far, a few seconds late, and of the
    trainer since it started.
    """
    import asyncio

    from metaclaw_hooks.plugins import HOOKS

    from metaclaw_plugin.errors import TrainerRefusedError, TrainerUnavailableError
    from metaclaw_plugin.store.counters import read_counters
    from metaclaw_plugin.worker.wiring import load_plugins

    settings, engine = _open(config)
    plugins = load_plugins(settings, engine, wanted=HOOKS)
    with engine.connect() as c:
        counted = read_counters(c)
    calls, failures, spent = (counted.get(f"hook_{name}", {}) for name in ("calls", "failures", "microseconds"))
    found = [
        {
            "plugin": info.name,
            "origin": info.origin,
            "agent": info.agent,
            "hook": hook,
            "scores_lone_reply": info.lone_reply if hook == "score_trace" else None,
            "calls": calls.get(f"{info.name}:{hook}", 0),
            "failures": failures.get(f"{info.name}:{hook}", 0),
            "seconds": spent.get(f"{info.name}:{hook}", 0) / 1e6,
        }
        for info in plugins.describe()
        for hook in info.hooks
    ]
    problems = dict(plugins.problems)
    plugins.close()
    silent = None
    if settings.rl.enabled:
        try:
            told = asyncio.run(_ask_trainer(settings.rl))
            found = _with_trainer(found, told)
            problems |= told.problems
        except (TrainerUnavailableError, TrainerRefusedError, TimeoutError) as error:
            silent = str(error) or f"the trainer at {settings.rl.remote_url} did not answer in time"
    if as_json:
        listed = {"folder": str(settings.hooks_path), "plugins": found, "problems": problems, "trainer_problem": silent}
        typer.echo(json.dumps(listed, indent=2))
        return
    _print_table(found, settings.hooks_path)
    if silent and any(row["hook"] in TRAINER_HOOKS for row in found):
        typer.echo(f"what the trainer's hooks did is not known: {silent}")
    for where, reason in problems.items():
        typer.echo(f"not loaded: {reason if where in reason else f'{where}: {reason}'}")
    typer.echo(
        f"Drop a .py file with a function named like a hook into {settings.hooks_path}: it is picked up at once."
    )


@app.command("try")
def try_command(
    trace: Annotated[str, typer.Argument(metavar="TRACE", help="Id of a stored trace; `metaclaw traces list`.")],
    config: Config = None,
    as_json: AsJson = False,
) -> None:
    """Ask every reward that is on for its agent about a stored trace, and store nothing.

    A judge is asked, and paid, as ever.
    """
    import asyncio

    from metaclaw_plugin.worker.trial import try_rewards

    settings, engine = _open(config)
    trial = asyncio.run(try_rewards(settings, engine, trace))
    if as_json:
        typer.echo(json.dumps(trial, indent=2))
        return
    for opinion in trial["rewards"]:
        typer.echo(f"{opinion['source']:<24} {opinion['value']:+.3f}  {opinion['rationale']}")
    for name, error in trial["failed"].items():
        typer.echo(f"{name:<24} failed: {error}")
    for name in trial["silent"]:
        typer.echo(f"{name:<24} no opinion")
    combined = trial["combined"]
    typer.echo(f"{'combined':<24} {'no opinion: it stays unscored' if combined is None else f'{combined:+.3f}'}")


async def _ask_trainer(rl: RlSettings) -> HooksReply:
    import asyncio

    import httpx

    from metaclaw_plugin.trainer_client import TrainerClient

    async with httpx.AsyncClient(trust_env=False) as http:
        client = TrainerClient(http, rl.remote_url, rl.remote_api_key)
        return await asyncio.wait_for(client.hooks(), TRAINER_PATIENCE)


def _with_trainer(found: list[dict[str, Any]], told: HooksReply) -> list[dict[str, Any]]:
    """``found`` with the trainer's figures; what only the trainer has, perhaps on another machine, is added."""
    rows = {(row["plugin"], row["hook"]): row for row in found}
    for theirs in told.hooks:
        if theirs.hook not in TRAINER_HOOKS:
            continue
        unseen = {**theirs.model_dump(), "scores_lone_reply": None, "calls": 0, "failures": 0, "seconds": 0.0}
        row = rows.setdefault((theirs.plugin, theirs.hook), unseen)
        row["calls"] += theirs.calls
        row["failures"] += theirs.failures
        row["seconds"] += theirs.seconds
    return list(rows.values())


def _print_table(found: list[dict[str, Any]], folder: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for name in ("plugin", "hook", "for", "calls", "failures", "ms a call", "from"):
        table.add_column(name, overflow="fold")
    for row in found:
        mean = f"{1000 * row['seconds'] / row['calls']:.2f}" if row["calls"] else "-"
        figures = (str(row["calls"]), str(row["failures"]), mean)
        table.add_row(
            row["plugin"], row["hook"], row["agent"] or "all", *figures, row["origin"].removeprefix(f"{folder}/")
        )
    Console().print(table)


def _open(config: Path | None) -> tuple[Settings, Engine]:
    from metaclaw_plugin.settings import find_config, load_settings
    from metaclaw_plugin.store.engine import open_store

    settings = load_settings(find_config(config))
    return settings, open_store(settings.store_url)
