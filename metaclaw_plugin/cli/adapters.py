"""``metaclaw adapters``: which weights answer, why, and how to change that."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from metaclaw_plugin.cli.options import AsJson, Config

if TYPE_CHECKING:
    from sqlalchemy.engine import Engine

    from metaclaw_plugin.store.adapters import VersionRecord

app = typer.Typer(rich_markup_mode=None, no_args_is_help=True)

VersionName = Annotated[str, typer.Argument(metavar="AGENT@vN", help="An adapter version, such as ada@v8.")]


@app.command("list")
def list_command(
    agent: Annotated[str | None, typer.Argument(help="Only this agent's; unset: all.")] = None,
    config: Config = None,
    as_json: AsJson = False,
) -> None:
    """List adapter versions with their state and the sentence that decided about them.

    States: candidate (not judged yet), serving (answers new exchanges), draining (ends what began on it), retired,
    rejected. A version that has learned from a trace which you deleted is named as such.
    """
    from metaclaw_plugin.store.adapters import list_versions
    from metaclaw_plugin.store.lineage import learned_from_deleted

    with _store(config) as engine, engine.connect() as c:
        records = list_versions(c, agent)
        agents = {record.version.agent for record in records}
        tainted = {(name, number) for name in agents for number in learned_from_deleted(c, name)}
    learned = {record.version.name: (record.version.agent, record.version.number) in tainted for record in records}
    if as_json:
        _print_json([record.summary() | {"learned_from_deleted": learned[record.version.name]} for record in records])
        return
    if not records:
        typer.echo("No adapter version yet: the base model answers. `metaclaw status` says why nothing is training.")
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for name in ("version", "state", "from", "step", "traces", "made", "decision"):
        table.add_column(name, overflow="fold")
    for record in records:
        version = record.version
        parent = f"v{version.parent}" if version.parent else "base"
        numbers = (parent, str(version.step), str(len(version.trace_ids)), _ago(version.created_at))
        table.add_row(version.name, record.shown_state, *numbers, _told(record, learned[version.name]))
    Console().print(table)


@app.command()
def show(name: VersionName, config: Config = None, as_json: AsJson = False) -> None:
    """Show one version: lineage, metrics of its step, the figures that decided, and where its files are."""
    with _store(config) as engine:
        record = _record(engine, name)
    if as_json:
        _print_json(record.details())
        return
    version = record.version
    lines: dict[str, Any] = {
        "state": record.shown_state,
        "decision": _sentence(record),
        "problem": record.problem,
        "trained from": f"v{version.parent}" if version.parent else "the base model",
        "base model": version.base_model,
        "step": version.step,
        "traces": len(version.trace_ids),
        "made": time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(version.created_at)),
        "sha256": version.sha256,
        "folder": version.path,
        "metrics": ", ".join(f"{key} {value:.4g}" for key, value in sorted(version.metrics.items())),
        "libraries": ", ".join(f"{key} {value}" for key, value in sorted(version.libraries.items())),
    }
    typer.echo(version.name)
    for label, value in lines.items():
        if value not in (None, ""):
            typer.echo(f"  {label:<13} {value}")


@app.command()
def promote(name: VersionName, config: Config = None) -> None:
    """Let a version serve, even one that was rejected or retired. Training goes on from it.

    No request is disturbed: the version that serves goes on until the other is loaded, and what began on it ends on it.
    """
    from metaclaw_hooks.names import parse_version

    from metaclaw_plugin.store.wishes import promote as wish

    agent, number = parse_version(name)
    with _store(config) as engine, engine.begin() as c:
        typer.echo(wish(c, agent, number))


@app.command()
def rollback(
    agent: Annotated[str, typer.Argument(help="The agent whose serving version is taken back.")],
    to: Annotated[
        int | None,
        typer.Option("--to", min=0, help="Version to go back to, 0: the base model; unset: the one before."),
    ] = None,
    config: Config = None,
) -> None:
    """Take back the version that serves. The one before it serves again, and training goes on from that one."""
    from metaclaw_plugin.store.wishes import rollback as wish

    with _store(config) as engine, engine.begin() as c:
        typer.echo(wish(c, agent, to))


@app.command()
def retrain(
    agent: Annotated[str, typer.Argument(help="The agent whose traces were deleted.")],
    without_deleted: Annotated[
        bool, typer.Option("--without-deleted", help="Leave out every version that learned from deleted traces.")
    ] = False,
    config: Config = None,
) -> None:
    """Go back to the last version that learned from no deleted trace, and train on from there.

    `metaclaw traces delete` says which versions have learned from what it deletes.
    """
    from metaclaw_plugin.errors import ConfigError
    from metaclaw_plugin.store.lineage import retrain_without_deleted

    if not without_deleted:
        raise ConfigError("say what to leave out: metaclaw adapters retrain AGENT --without-deleted")
    with _store(config) as engine, engine.begin() as c:
        typer.echo(retrain_without_deleted(c, agent))


@app.command()
def export(
    name: VersionName,
    folder: Annotated[Path, typer.Argument(help="New folder to write; it must not exist yet.")],
    config: Config = None,
) -> None:
    """Write a version as a plain PEFT folder, which `PeftModel.from_pretrained` and vLLM load.

    Files that are on the trainer's machine alone are fetched from it."""
    from metaclaw_plugin.exporting import export_version
    from metaclaw_plugin.settings import find_config, load_settings

    with _store(config) as engine:
        record = _record(engine, name)
    rl = load_settings(find_config(config)).rl
    export_version(record.version, folder, rl.remote_url, rl.headers)
    typer.echo(f"{record.version.name} written to {folder}; it belongs to the base model {record.version.base_model}")


@contextmanager
def _store(config: Path | None) -> Iterator[Engine]:
    from metaclaw_plugin.settings import find_config, load_settings
    from metaclaw_plugin.store.engine import open_store

    engine = open_store(load_settings(find_config(config)).store_url)
    try:
        yield engine
    finally:
        engine.dispose()


def _record(engine: Engine, name: str) -> VersionRecord:
    from metaclaw_hooks.names import parse_version

    from metaclaw_plugin.store.adapters import get_version

    with engine.connect() as c:
        return get_version(c, *parse_version(name))


def _told(record: VersionRecord, learned_from_deleted: bool) -> str:
    sentence = record.problem or _sentence(record)
    return f"{sentence}; learned from deleted traces" if learned_from_deleted else sentence


def _sentence(record: VersionRecord) -> str:
    return str((record.decision or {}).get("sentence", ""))


def _ago(when: float) -> str:
    seconds = max(0.0, time.time() - when)
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"


def _print_json(value: Any) -> None:
    json.dump(value, sys.stdout, indent=2, ensure_ascii=False)
    sys.stdout.write("\n")
