"""``metaclaw service``: MetaClaw under systemd, for one user."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from metaclaw_plugin.cli.options import Config
from metaclaw_plugin.errors import ConfigError

app = typer.Typer(rich_markup_mode=None)

UNIT_NAME = "metaclaw.service"


@app.command()
def service(
    write: Annotated[
        bool, typer.Option("--write", help="Put it where systemd finds it, instead of printing it.")
    ] = False,
    config: Config = None,
) -> None:
    """Print a systemd user unit that runs `metaclaw start`, or put it in its place with --write."""
    from metaclaw_plugin.settings import find_config, load_settings

    path = find_config(config)
    if path is None:
        raise ConfigError("no config file: `metaclaw setup` writes one")
    text = unit(sys.executable, path.absolute(), load_settings(path).home)
    if not write:
        typer.echo(text, nl=False)
        return
    target = Path("~/.config/systemd/user").expanduser() / UNIT_NAME
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write {target}: {error.strerror}") from error
    typer.echo(
        f"wrote {target}; keys of upstream models go into {path.absolute().parent / 'environment'} as NAME=VALUE."
    )
    typer.echo(f"Start it now and at every login: systemctl --user enable --now {UNIT_NAME}")


def unit(python: str, config: Path, home: Path) -> str:
    """The unit's text. The supervisor ends its processes itself, in order, so only it is told to stop."""
    return f"""\
[Unit]
Description=MetaClaw: agents that get better every time you talk to them
After=network-online.target

[Service]
ExecStart={_quoted(python)} -m metaclaw_plugin.cli.main start --config {_quoted(str(config))}
Environment={_quoted(f"METACLAW_HOME={home}")}
EnvironmentFile=-{config.parent / "environment"}
KillMode=mixed
TimeoutStopSec=180
Restart=on-failure
RestartSec=10

[Install]
WantedBy=default.target
"""


def _quoted(word: str) -> str:
    """A word as systemd reads it: quotes and backslashes escaped, % doubled."""
    return '"' + word.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%") + '"'
