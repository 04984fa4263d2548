"""Commands of ``metaclaw skills`` about evolution: evolve, review."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from metaclaw_plugin.cli.options import AsJson, Config
from metaclaw_plugin.cli.skills_shared import OfAgent, known_agent, open_home

if TYPE_CHECKING:
    from metaclaw_plugin.skills.support import RoundRecord


def evolve(
    agent: Annotated[str, typer.Argument(help="The agent.", metavar="AGENT")],
    as_json: AsJson = False,
    config: Config = None,
) -> None:
    """Show the agent's failed traces to the evolver now, and carry out (or lay down for review) what it proposes.

    The traces shown are never trained on. The worker does this by itself when metaclaw.skills.evolution.model is set.
    """
    import asyncio

    import httpx

    from metaclaw_plugin.skills.upkeep import evolve_now

    settings, engine = open_home(config)

    async def ask() -> RoundRecord | None:
        async with httpx.AsyncClient(trust_env=False) as http:
            return await evolve_now(settings, engine, http, agent)

    record = asyncio.run(ask())
    if as_json:
        typer.echo(json.dumps(None if record is None else _round(record), indent=2))
    elif record is None:
        typer.echo(
            f"{agent} has no failure to learn from: no scored trace that is free, with a reward at or below zero"
        )
    else:
        _say_round(record)
    if record is not None and record.state == "failed":
        raise typer.Exit(1)


def review(
    agent: OfAgent = None,
    accept: Annotated[list[str] | None, typer.Option("--accept", help="Carry out this proposal.", metavar="ID")] = None,
    reject: Annotated[list[str] | None, typer.Option("--reject", help="Turn this proposal down.", metavar="ID")] = None,
    as_json: AsJson = False,
    config: Config = None,
) -> None:
    """Show what waits for your yes, and the latest rounds; --accept and --reject decide (with --agent)."""
    from metaclaw_plugin.errors import SkillError
    from metaclaw_plugin.skills.editing import SkillFolder
    from metaclaw_plugin.skills.evolution import accept_proposal
    from metaclaw_plugin.skills.support import rounds
    from metaclaw_plugin.store.agents import list_agents

    settings, engine = open_home(config)
    with engine.connect() as c:
        names = [record.name for record in list_agents(c)] if agent is None else [known_agent(engine, agent)]
        latest = rounds(c, agent)
    if (accept or reject) and agent is None:
        raise SkillError("say whose proposals with --agent")
    for name in names:
        folder = SkillFolder(settings.skills_path, name)
        for wanted in accept or []:
            generation = accept_proposal(engine, folder, folder.proposal(wanted))
            typer.echo(f"accepted {wanted}; {name}'s skills are of generation {generation} now", err=as_json)
        for wanted in reject or []:
            folder.reject(folder.proposal(wanted))
            typer.echo(f"rejected {wanted}", err=as_json)
    waiting = [
        {
            "id": proposal.id,
            "agent": name,
            "action": proposal.change.action,
            "name": proposal.change.name,
            "retires": list(proposal.change.retires),
            "reason": proposal.change.reason,
            "file": None if proposal.change.data is None else proposal.change.data.decode(),
        }
        for name in names
        for proposal in SkillFolder(settings.skills_path, name).proposals()
    ]
    if as_json:
        typer.echo(json.dumps({"proposals": waiting, "rounds": [_round(record) for record in latest]}, indent=2))
        return
    for row in waiting:
        typer.echo(f"{row['id']}  of {row['agent']}: {row['action']} {row['name']}: {row['reason']}")
        typer.echo("".join(f"    {line}\n" for line in str(row["file"] or "").splitlines()).rstrip())
    if not waiting:
        typer.echo("nothing waits for review")
    for record in latest:
        _say_round(record)


def _round(record: RoundRecord) -> dict[str, Any]:
    return {name: getattr(record, name) for name in record.__slots__}


def _say_round(record: RoundRecord) -> None:
    head = f"{record.id}  of {record.agent}: {record.state}, {len(record.trace_ids)} failures shown to {record.model}"
    typer.echo(f"{head}, {record.seconds:.1f} s")
    for change in record.detail.get("accepted", ()):
        typer.echo(f"    {change['action']} {change['name']}: {change['reason']}")
    for item in record.detail.get("refused", ()):
        typer.echo(f"    refused {item['name']}: {item['reason']}")
    if "error" in record.detail:
        typer.echo(f"    {record.detail['error']}")
