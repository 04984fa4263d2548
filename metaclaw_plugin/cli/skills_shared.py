"""What the commands of ``metaclaw skills`` share: their options, and the way to the library."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from sqlalchemy.engine import Engine

    from metaclaw_plugin.settings import Settings
    from metaclaw_plugin.skills.editing import SkillFolder
    from metaclaw_plugin.skills.ledger import LedgerEntry
    from metaclaw_plugin.skills.library import Library
    from metaclaw_plugin.skills.skill_file import Skill

Name = Annotated[str, typer.Argument(help="The skill: 1 to 63 of a-z, 0-9 and '-'.", metavar="NAME")]
OfAgent = Annotated[
    str | None, typer.Option("--agent", "-a", help="An agent's own skills; unset: the shared ones.", metavar="NAME")
]
Description = Annotated[str | None, typer.Option("--description", "-d", help="When it applies: 'Use when ...'.")]
Body = Annotated[str | None, typer.Option("--body", "-b", help="What to do, as Markdown; '-' reads standard input.")]
Triggers = Annotated[str | None, typer.Option("--triggers", help="Words that such questions contain, with commas.")]
Category = Annotated[str | None, typer.Option("--category", help="Such as coding or research.")]


def open_home(config: Path | None) -> tuple[Settings, Engine]:
    """Settings and store; the library has its starter set from now on."""
    from metaclaw_plugin.settings import find_config, load_settings
    from metaclaw_plugin.skills.opening import open_library
    from metaclaw_plugin.store.engine import open_store

    settings = load_settings(find_config(config))
    open_library(settings)
    return settings, open_store(settings.store_url)


def known_agent(engine: Engine, name: str) -> str:
    """``name``, if there is such an agent."""
    from metaclaw_plugin.store.agents import get_record

    with engine.connect() as c:
        return get_record(c, name).name


def owner_of(engine: Engine, agent: str | None) -> str:
    """Whose folder is meant: the agent's, or the shared one."""
    from metaclaw_plugin.skills.skill_file import SHARED

    return SHARED if agent is None else known_agent(engine, agent)


def folder_of(settings: Settings, engine: Engine, agent: str | None) -> SkillFolder:
    """That folder, to write to."""
    from metaclaw_plugin.skills.editing import SkillFolder

    return SkillFolder(settings.skills_path, owner_of(engine, agent))


def find_skill(library: Library, owner: str, name: str) -> Skill:
    """What ``owner`` can use under this name.

    Raises:
        SkillError: if there is none.
    """
    from metaclaw_plugin.errors import SkillError

    skill: Skill | None = library.view(owner).skills.get(name)
    if skill is not None:
        return skill
    elsewhere = [other for other in library.owners() if name in library.skills_of(other)]
    hint = f"; {', '.join(elsewhere)} has one: use --agent" if elsewhere else "; `metaclaw skills list` shows them"
    raise SkillError(f"{owner} has no skill {name[:80]!r}{hint}")


def ledger_of(engine: Engine, agent: str) -> dict[str, LedgerEntry]:
    """The figures of the last count, by skill."""
    from metaclaw_plugin.skills.ledger import read_ledger

    with engine.connect() as c:
        return read_ledger(c, agent)


def problems_of(library: Library) -> list[dict[str, str]]:
    """Files that cannot be used, for printing."""
    return [
        {"owner": problem.owner, "name": problem.name, "message": problem.message} for problem in library.problems()
    ]


def figures_of(skill: Skill, entry: LedgerEntry | None) -> dict[str, Any]:
    """All that is known of a skill, for printing."""
    return {
        "name": skill.name,
        "owner": skill.owner,
        "version": skill.version,
        "category": skill.category,
        "description": skill.description,
        "tokens": skill.tokens,
        "evolved": skill.metadata.get("origin") == "evolved",
        "uses": entry.uses if entry else 0,
        "reward_with": entry.with_.mean if entry else None,
        "reward_without": entry.without.mean if entry else None,
        "uplift": entry.uplift if entry else None,
        "interval": entry.interval if entry else None,
        "measured": entry.summary if entry else None,
    }
