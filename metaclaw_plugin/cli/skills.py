"""``metaclaw skills``: look at the library; its sister modules change it and let it evolve."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from metaclaw_plugin.cli import skills_changes, skills_evolution
from metaclaw_plugin.cli.options import AsJson, Config
from metaclaw_plugin.cli.skills_shared import (
    Name,
    OfAgent,
    figures_of,
    find_skill,
    known_agent,
    ledger_of,
    open_home,
    owner_of,
    problems_of,
)

app = typer.Typer(
    rich_markup_mode=None,
    no_args_is_help=True,
    help="Look at and edit the skill library. Skills are folders with a SKILL.md: files are the truth.",
)


@app.command("list")
def list_(agent: OfAgent = None, as_json: AsJson = False, config: Config = None) -> None:
    """List skills, how often each was used, and whether it helps.

    With --agent: all that this agent can use, its own first; these hide shared ones of the same name. The uplift is the
    mean reward of sessions with the skill, less that of sessions that went without it on purpose, with its 95 %
    interval.
    """
    from metaclaw_plugin.skills.library import Library
    from metaclaw_plugin.skills.skill_file import SHARED

    settings, engine = open_home(config)
    library = Library(settings.skills_path)
    owners = library.owners() if agent is None else [known_agent(engine, agent)]
    rows: list[dict[str, Any]] = []
    for owner in owners:
        ledger = ledger_of(engine, owner)
        skills = library.view(owner).skills if agent else library.skills_of(owner)
        own_first = sorted(skills.values(), key=lambda skill: (skill.owner == SHARED, skill.name))
        rows += [figures_of(skill, ledger.get(skill.name)) for skill in own_first]
    problems = [found for found in problems_of(library) if agent is None or found["owner"] in (agent, "_shared")]
    if as_json:
        typer.echo(json.dumps({"skills": rows, "problems": problems}, indent=2))
        return
    for row in rows:
        measured = row["measured"] or "not measured yet"
        typer.echo(f"{row['owner']}/{row['name']}  ({row['tokens']} tokens, {measured})\n    {row['description']}")
    if not rows:
        typer.echo(f"no skills in {settings.skills_path}; `metaclaw skills add NAME` adds one")
    for problem in problems:
        typer.echo(f"cannot be used: {problem['owner']}/{problem['name']}: {problem['message']}", err=True)


@app.command()
def show(name: Name, agent: OfAgent = None, as_json: AsJson = False, config: Config = None) -> None:
    """Show one skill whole, where it comes from, and how it does."""
    from metaclaw_plugin.skills.library import Library

    settings, engine = open_home(config)
    owner = owner_of(engine, agent)
    skill = find_skill(Library(settings.skills_path), owner, name)
    figures = figures_of(skill, ledger_of(engine, owner).get(name))
    if as_json:
        typer.echo(json.dumps(figures | {"body": skill.body, "metadata": dict(skill.metadata)}, indent=2))
        return
    typer.echo(f"{skill.owner}/{skill.name}  version {skill.version}, {figures['measured'] or 'not measured yet'}")
    for key, value in skill.metadata.items():
        typer.echo(f"{key}: {value}")
    typer.echo(f"\n{skill.description}\n\n{skill.body}")


@app.command()
def search(
    query: Annotated[str, typer.Argument(help="A question, as a user would put it.", metavar="QUERY")],
    agent: OfAgent = None,
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, help="Most results.")] = 10,
    as_json: AsJson = False,
    config: Config = None,
) -> None:
    """Try retrieval: which skills a question finds, how relevant each is, and which would be injected."""
    from metaclaw_plugin.skills.embedding import load_embedder
    from metaclaw_plugin.skills.library import Library
    from metaclaw_plugin.skills.retrieval import Retriever

    settings, engine = open_home(config)
    retriever = Retriever(Library(settings.skills_path), settings.skills, load_embedder(settings.skills))
    retriever.embed_new()
    owner = owner_of(engine, agent)
    injected = {skill.name for skill in retriever.select(owner, [{"role": "user", "content": query}])}
    rows = [
        {
            "name": item.skill.name,
            "owner": item.skill.owner,
            "relevance": round(item.relevance, 4),
            "injected": item.skill.name in injected,
            "description": item.skill.description,
        }
        for item in retriever.search(owner, query, limit)
    ]
    if as_json:
        typer.echo(json.dumps({"threshold": retriever.threshold, "results": rows}, indent=2))
        return
    for row in rows:
        mark = "injected" if row["injected"] else "-"
        typer.echo(f"{row['relevance']:.3f}  {mark:<8}  {row['owner']}/{row['name']}: {row['description']}")
    typer.echo(f"threshold {retriever.threshold:g}" if rows else "nothing in the library fits")


app.command()(skills_changes.add)
app.command()(skills_changes.edit)
app.command()(skills_changes.remove)
app.command("import")(skills_changes.import_)
app.command()(skills_evolution.evolve)
app.command()(skills_evolution.review)
