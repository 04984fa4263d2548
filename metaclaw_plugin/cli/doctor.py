"""``metaclaw doctor``: is all well, and if not, what to do."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Annotated

import typer

from metaclaw_plugin.cli.options import AsJson, Config

app = typer.Typer(rich_markup_mode=None)

MARKS = {"ok": "ok     ", "warning": "warning", "failure": "FAILURE"}


@app.command()
def doctor(
    config: Config = None,
    fix: Annotated[bool, typer.Option("--fix", help="Remove packages that break a machine without CUDA.")] = False,
    as_json: AsJson = False,
) -> None:
    """Check versions, GPU, disk, permissions, ports, configuration, vLLM and trainer; each with its remedy.

    What does not run is a warning, so it is useful before and after a start. The exit code is 1 if anything failed.
    """
    from dataclasses import asdict

    from metaclaw_plugin.doctor.finding import Level
    from metaclaw_plugin.doctor.machine import broken_by_cuda
    from metaclaw_plugin.doctor.report import examine
    from metaclaw_plugin.settings import find_config, load_settings

    if fix and (broken := broken_by_cuda()):
        subprocess.run([sys.executable, "-m", "pip", "uninstall", "-y", *broken], check=True)
    path = find_config(config)
    settings = load_settings(path)
    findings = list(examine(settings, path))
    if as_json:
        typer.echo(json.dumps([{**asdict(finding), "level": finding.level.value} for finding in findings], indent=2))
    else:
        for finding in findings:
            typer.echo(f"{MARKS[finding.level.value]}  {finding.about}: {finding.seen}")
            if finding.remedy:
                typer.echo(f"         -> {finding.remedy}")
    if any(finding.level is Level.FAILURE for finding in findings):
        raise typer.Exit(1)
