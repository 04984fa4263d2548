"""``metaclaw logs``: what the processes wrote."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from metaclaw_plugin.cli.options import Config
from metaclaw_plugin.errors import ProcessError

app = typer.Typer(rich_markup_mode=None)


@app.command()
def logs(
    name: Annotated[
        str | None, typer.Argument(help="gateway, worker, trainer, vllm or supervisor; unset: all.")
    ] = None,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on showing what is written, until Ctrl-C.")
    ] = False,
    lines: Annotated[int, typer.Option("--lines", "-n", min=0, help="How many of the newest lines of each.")] = 40,
    config: Config = None,
) -> None:
    """Show the newest lines of the logs in METACLAW_HOME/logs."""
    from metaclaw_plugin.settings import find_config, load_settings
    from metaclaw_plugin.supervisor.state import Home

    folder = Home(load_settings(find_config(config)).home).logs
    files = sorted(folder.glob("*.log"))
    if name is not None:
        files = [file for file in files if file.stem == name]
        if not files:
            known = ", ".join(sorted(file.stem for file in folder.glob("*.log"))) or "none yet"
            raise ProcessError(f"no log named {name} in {folder}; there are: {known}")
    offsets = {file: _print_tail(file, lines, len(files) > 1) for file in files}
    while follow:
        for file, offset in offsets.items():
            offsets[file] = _print_new(file, offset, len(files) > 1)
        time.sleep(0.3)


def _print_tail(file: Path, lines: int, named: bool) -> int:
    from metaclaw_plugin.supervisor.diagnosis import read_tail

    size = file.stat().st_size
    _print(file, read_tail(file, size=400 * max(lines, 1)).splitlines()[-lines:] if lines else [], named)
    return size


def _print_new(file: Path, offset: int, named: bool) -> int:
    size = file.stat().st_size if file.exists() else 0
    if size < offset:  # rotated
        offset = 0
    if size > offset:
        with file.open("rb") as stream:
            stream.seek(offset)
            _print(file, stream.read(size - offset).decode("utf-8", errors="replace").splitlines(), named)
    return size


def _print(file: Path, lines: list[str], named: bool) -> None:
    for line in lines:
        typer.echo(f"{file.stem:<10} {line}" if named else line)
