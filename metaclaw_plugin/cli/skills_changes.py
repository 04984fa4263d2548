"""Commands of ``metaclaw skills`` that change the library: add, edit, remove, import."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from metaclaw_plugin.cli.options import AsJson, Config
from metaclaw_plugin.cli.skills_shared import (
    Body,
    Category,
    Description,
    Name,
    OfAgent,
    Triggers,
    find_skill,
    folder_of,
    open_home,
)

if TYPE_CHECKING:
    from metaclaw_plugin.skills.skill_file import Skill


def add(
    name: Name,
    description: Description = None,
    body: Body = None,
    triggers: Triggers = None,
    category: Category = None,
    agent: OfAgent = None,
    as_json: AsJson = False,
    config: Config = None,
) -> None:
    """Add a skill. It is in use within a second; no restart is needed.

    Example: metaclaw skills add be-brief -d "Use when asked for a summary." -b "At most five lines."
    """
    from metaclaw_plugin.errors import SkillError
    from metaclaw_plugin.skills.skill_file import render_skill

    settings, engine = open_home(config)
    folder = folder_of(settings, engine, agent)
    if folder.path(name).exists():
        raise SkillError(f"{folder.owner} has a skill {name!r} already; `metaclaw skills edit {name}` changes it")
    if not description or not body:
        raise SkillError("a skill needs --description (when it applies) and --body (what to do)")
    metadata = {"triggers": triggers} if triggers else {}
    _say(folder.put(name, render_skill(name, description, _text(body), category, metadata)), as_json)


def edit(
    name: Name,
    description: Description = None,
    body: Body = None,
    triggers: Triggers = None,
    category: Category = None,
    agent: OfAgent = None,
    as_json: AsJson = False,
    config: Config = None,
) -> None:
    """Change a skill: in $EDITOR, or by the options given. A mistake changes nothing.

    With --agent a shared skill is copied first: from then on the agent has its own.
    """
    from metaclaw_plugin.skills.library import Library
    from metaclaw_plugin.skills.skill_file import render_skill

    settings, engine = open_home(config)
    folder = folder_of(settings, engine, agent)
    skill = find_skill(Library(settings.skills_path), folder.owner, name)
    if description is body is triggers is category is None:
        source = settings.skills_path / skill.owner / name / "SKILL.md"
        data = _edited(source.read_bytes())
        if data == source.read_bytes():
            typer.echo("nothing was changed")
            return
    else:
        metadata = dict(skill.metadata) | ({"triggers": triggers} if triggers is not None else {})
        data = render_skill(
            name,
            description or skill.description,
            _text(body) if body else skill.body,
            category if category is not None else skill.category,
            metadata,
        )
    _say(folder.put(name, data), as_json)


def remove(
    name: Name,
    agent: OfAgent = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    as_json: AsJson = False,
    config: Config = None,
) -> None:
    """Take a skill out of use. Its folder is moved to .retired, from where it can be moved back."""
    settings, engine = open_home(config)
    folder = folder_of(settings, engine, agent)
    if not yes:
        typer.confirm(f"Take {folder.owner}/{name} out of use?", abort=True)
    moved = folder.take_out(name)
    typer.echo(json.dumps({"removed": name, "moved_to": str(moved)}) if as_json else f"removed; it lies in {moved}")


def import_(
    source: Annotated[Path, typer.Argument(help="A folder with SKILL.md, or with such folders.", metavar="DIR")],
    agent: OfAgent = None,
    replace: Annotated[bool, typer.Option("--replace", help="Overwrite skills of the same name.")] = False,
    as_json: AsJson = False,
    config: Config = None,
) -> None:
    """Copy skills in the Agent Skills format into the library, each checked first. Exit code 1 if one was refused."""
    from metaclaw_plugin.skills.importing import import_skills

    settings, engine = open_home(config)
    done = import_skills(source, folder_of(settings, engine, agent), replace)
    if as_json:
        rows = [{"name": item.name, "state": item.state, "notes": list(item.notes)} for item in done]
        typer.echo(json.dumps(rows, indent=2))
    else:
        for item in done:
            typer.echo(f"{item.state:<8}  {item.name}" + "".join(f"\n          {note}" for note in item.notes))
    if any(item.state == "refused" for item in done):
        raise typer.Exit(1)


def _say(skill: Skill, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps({"name": skill.name, "owner": skill.owner, "version": skill.version}))
    else:
        typer.echo(f"{skill.owner}/{skill.name} is version {skill.version} now, about {skill.tokens} tokens")


def _text(value: str) -> str:
    return sys.stdin.read() if value == "-" else value


def _edited(data: bytes) -> bytes:
    """What the user's editor made of ``data``."""
    from metaclaw_plugin.errors import SkillError

    editor = os.environ.get("VISUAL") or os.environ.get("EDITOR") or "vi"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "SKILL.md"
        path.write_bytes(data)
        try:
            subprocess.run([*shlex.split(editor), str(path)], check=True)
            return path.read_bytes()
        except (OSError, subprocess.CalledProcessError) as error:
            raise SkillError(f"the editor {editor!r} failed ({error}); set EDITOR, or use --body") from error
