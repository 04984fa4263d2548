"""``metaclaw backup`` and ``metaclaw restore``."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from metaclaw_plugin.cli.options import AsJson, Config

if TYPE_CHECKING:
    from metaclaw_plugin.backup import BackupReport

app = typer.Typer(rich_markup_mode=None)


@app.command()
def backup(
    archive: Annotated[
        Path | None, typer.Argument(help="File to write; unset: metaclaw-TIME.tar.gz in the present folder.")
    ] = None,
    as_json: AsJson = False,
    config: Config = None,
) -> None:
    """Save METACLAW_HOME and the store in one file, while everything goes on running.

    It holds the agents, keys (as hashes), traces, skills, hooks and adapters; logs are left out. Keep it as safe as the
    conversations that are in it.
    """
    from metaclaw_plugin.backup import back_up
    from metaclaw_plugin.settings import find_config, load_settings

    settings = load_settings(find_config(config))
    name = f"metaclaw-{datetime.now(UTC).strftime('%Y%m%d-%H%M%S')}.tar.gz"
    _print("saved to", back_up(settings, (archive or Path(name)).absolute()), as_json)


@app.command()
def restore(
    archive: Annotated[Path, typer.Argument(help="File that `metaclaw backup` wrote.")],
    replace: Annotated[bool, typer.Option("--replace", help="Move a METACLAW_HOME that is not empty aside.")] = False,
    as_json: AsJson = False,
    config: Config = None,
) -> None:
    """Put a backup in the place of METACLAW_HOME and of the store. MetaClaw must not run.

    Nothing is lost: what was there lies beside it afterwards, with .before-restore-TIME added to its name. A store on
    PostgreSQL must be empty; a backup of SQLite may be restored there, and the other way round.
    """
    from metaclaw_plugin.backup import restore as put_back
    from metaclaw_plugin.settings import find_config, load_settings
    from metaclaw_plugin.supervisor.state import Home

    path = find_config(config)
    settings = load_settings(path)
    home = Home(settings.home)
    with home.lock() if home.run.is_dir() else nullcontext():
        report = put_back(settings, archive, replace, own_config=path is None)
    _print("restored from", report, as_json)


def _print(what: str, report: BackupReport, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(asdict(report), indent=2))
        return
    size = report.bytes / 1e6
    typer.echo(f"{what} {report.path}: {report.files} files, {size:.1f} MB, {report.rows} rows of the store")
