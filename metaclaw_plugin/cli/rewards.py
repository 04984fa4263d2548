"""``metaclaw rewards``: what was thought of each reply, and what you think of it."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from metaclaw_plugin.cli.options import AsJson, Config

if TYPE_CHECKING:
    from pathlib import Path

    from sqlalchemy.engine import Engine

app = typer.Typer(rich_markup_mode=None, no_args_is_help=True)

OfAgent = Annotated[str, typer.Option("--agent", "-a", help="The agent.", metavar="NAME")]


@app.command()
def show(
    trace: Annotated[str, typer.Argument(metavar="TRACE", help="Id of a trace; `metaclaw traces list` shows them.")],
    config: Config = None,
    as_json: AsJson = False,
) -> None:
    """Show every opinion about a reply, the reward that came of them, and how far it has come as a sample."""
    from metaclaw_plugin.store.traces import get_stored

    with _open(config).connect() as c:
        stored = get_stored(c, trace)
    if as_json:
        rewards = [asdict(reward) for reward in stored.rewards]
        figures = {"score": stored.score, "reward": stored.reward, "scored_at": stored.scored_at, "hint": stored.hint}
        sample = {"purpose": stored.trace.purpose, "forward": stored.forward, "sample": stored.sample_id}
        typer.echo(json.dumps({"trace": trace, "agent": stored.trace.agent, **figures, **sample, "rewards": rewards}))
        return
    value = "none" if stored.reward is None else f"{stored.reward:+.3f}"
    typer.echo(f"trace    {trace} of {stored.trace.agent}, session {stored.trace.session}, turn {stored.trace.turn}")
    typer.echo(f"reward   {value} ({stored.score}); {stored.trace.purpose}, {stored.forward}")
    if stored.hint:
        typer.echo(f"hint     {stored.hint}")
    for reward in stored.rewards:
        sure = f"confidence {reward.confidence:.2f}"
        typer.echo(f"{reward.source:<24} {reward.value:+.3f}  {sure}  {reward.rationale}")
    if not stored.rewards:
        typer.echo(
            "No opinion yet." if stored.score == "waiting" else "Nobody had an opinion, so it is not trained on."
        )


@app.command(context_settings={"ignore_unknown_options": True})  # so that -1 is a value and no option
def add(
    target: Annotated[
        str, typer.Argument(metavar="TRACE", help="Id of a trace, or of the response that the client saw.")
    ],
    value: Annotated[float, typer.Argument(min=-1.0, max=1.0, help="From -1 (bad) to 1 (good).")],
    comment: Annotated[str, typer.Option("--comment", help="Why.")] = "",
    agent: Annotated[
        str | None, typer.Option("--agent", "-a", help="Whose response; needed when it is not stored yet.")
    ] = None,
    config: Config = None,
) -> None:
    """Say what a reply was worth. It takes the place of everything that was inferred, however late it comes."""
    from metaclaw_plugin.errors import UnknownTraceError
    from metaclaw_plugin.store.agents import get_record, list_agents
    from metaclaw_plugin.store.rewards import add_feedback
    from metaclaw_plugin.store.traces import find_trace

    with _open(config).begin() as c:
        names = [get_record(c, agent).name] if agent else [record.name for record in list_agents(c)]
        owners = [name for name in names if find_trace(c, name, target)]
        if len(owners) > 1:
            raise UnknownTraceError(f"{target!r} is a response of {', '.join(owners)}: say which with --agent")
        if not owners and agent is None:
            raise UnknownTraceError(f"no trace or response {target[:80]!r}; name its --agent if it is not stored yet")
        owner = owners[0] if owners else names[0]
        add_feedback(c, owner, target, value, comment, time.time())
    typer.echo(f"Noted {value:+g} for {target} of {owner}; the worker applies it.")


@app.command()
def rescore(
    agent: OfAgent,
    since: Annotated[
        str | None,
        typer.Option("--since", help="Not before: 2026-11-22, 2026-11-22T10:00, or an age such as 7d, 12h, 30m."),
    ] = None,
    trace: Annotated[str | None, typer.Option("--trace", help="Only this trace.", metavar="ID")] = None,
    config: Config = None,
) -> None:
    """Let an agent's replies be scored again, by the rewards that are on now.

    Explicit feedback stays in force. What waits in the trainer's queue gets its new reward there. What was trained on
    is not trained on again; its new reward counts in figures.
    """
    from metaclaw_plugin.cli.traces import parse_time
    from metaclaw_plugin.store.agents import get_record
    from metaclaw_plugin.store.rewards import score_again

    begin = None if since is None else parse_time(since, time.time())
    with _open(config).begin() as c:
        get_record(c, agent)
        count = score_again(c, agent, begin, trace)
    typer.echo(f"{count} trace(s) of {agent} are scored again by the worker.")


def _open(config: Path | None) -> Engine:
    from metaclaw_plugin.settings import find_config, load_settings
    from metaclaw_plugin.store.engine import open_store

    return open_store(load_settings(find_config(config)).store_url)
