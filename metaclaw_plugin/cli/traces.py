"""``metaclaw traces``: what was captured."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Iterable
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from metaclaw_plugin.cli.options import AsJson, Config

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import TextIO

    from sqlalchemy.engine import Engine

    from metaclaw_plugin.store.traces import TraceFilter

app = typer.Typer(rich_markup_mode=None, no_args_is_help=True, help="Look at, export and delete what was captured.")

OfAgent = Annotated[str | None, typer.Option("--agent", "-a", help="Of this agent.", metavar="NAME")]
OfSession = Annotated[str | None, typer.Option("--session", "-s", help="Of this session.", metavar="ID")]
Since = Annotated[
    str | None,
    typer.Option("--since", help="Not before: 2026-11-22, 2026-11-22T10:00, or an age such as 7d, 12h, 30m."),
]
Until = Annotated[str | None, typer.Option("--until", "--older-than", help="Before that time, or older than that age.")]

_AGE = re.compile(r"(\d+)([smhdw])")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}


@app.command("list")
def list_(
    agent: OfAgent = None,
    session: OfSession = None,
    since: Since = None,
    until: Until = None,
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, help="The newest so many.")] = 20,
    as_json: AsJson = False,
    config: Config = None,
) -> None:
    """List the newest traces, newest first."""
    from metaclaw_plugin.store.export import list_summaries

    where = _filter(agent, session, since, until)
    with _open(config).connect() as c:
        rows = list_summaries(c, where, limit, newest_first=True)
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    for row in rows:
        when = datetime.fromtimestamp(row["finished_at"], UTC).strftime("%Y-%m-%d %H:%M:%S")
        reward = "-" if row["reward"] is None else f"{row['reward']:+.2f}"
        place = f"{row['session'][:12]}/{row['turn']}"
        version = f"{row['agent']}@v{row['adapter_version']}"
        size = "-" if row["response_tokens"] is None else f"{row['response_tokens']} tokens"
        typer.echo(f"{when}  {row['id']}  {version}  {place}  {row['kind']}  {reward}  {size}  {_use(row)}")


def _use(row: dict[str, Any]) -> str:
    """What becomes of a trace, in a few words."""
    if row["purpose"] == "support":
        return "support: shown to the evolver, never trained on"
    if row["purpose"] == "held_out":
        return "held out: replayed by the gate, never trained on"
    if not row["trainable"]:
        return f"not trainable: {row['reason']}"
    if row["forward"] == "skipped":
        return f"not trained on: {row['forward_reason']}"
    return "trained on" if row["forward"] == "trained" else "trainable"


@app.command()
def show(
    trace: Annotated[str, typer.Argument(help="Id of a trace, or of the response that the client saw.")],
    config: Config = None,
) -> None:
    """Print one trace with its rewards, as JSON."""
    import sqlalchemy as sa

    from metaclaw_plugin.store import schema
    from metaclaw_plugin.store.export import stored_json
    from metaclaw_plugin.store.traces import get_stored

    t = schema.traces.c
    with _open(config).connect() as c:
        by_response = sa.select(t.id).where(t.response_id == trace).order_by(t.seq.desc()).limit(1)
        found = stored_json(get_stored(c, c.execute(by_response).scalar_one_or_none() or trace))
    typer.echo(json.dumps(found, indent=2))


@app.command()
def export(
    agent: OfAgent = None,
    session: OfSession = None,
    since: Since = None,
    until: Until = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File to write; unset: standard output.")
    ] = None,
    config: Config = None,
) -> None:
    """Export traces as JSON lines, oldest first: the fields of a trace, then its rewards and where it stands."""
    from metaclaw_plugin.store.export import export_traces

    where = _filter(agent, session, since, until)
    with _open(config).connect() as c, _writing(output) as file:
        _write_lines(file, export_traces(c, where))


@app.command()
def delete(
    agent: OfAgent = None,
    session: OfSession = None,
    trace: Annotated[str | None, typer.Option("--trace", help="This one trace.", metavar="ID")] = None,
    since: Since = None,
    until: Until = None,
    everything: Annotated[bool, typer.Option("--all", help="All traces of all agents.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    as_json: AsJson = False,
    config: Config = None,
) -> None:
    """Delete traces for good, with their rewards and feedback, and report what went.

    What was sent to the trainer is taken out of its queue by the worker. What an adapter has learned stays in it:
    the report names the versions, and `metaclaw adapters retrain` starts again without them.
    """
    from metaclaw_plugin.errors import ConfigError
    from metaclaw_plugin.store.deletion import delete_all

    if not everything and (agent, session, trace, since, until) == (None,) * 5:
        raise ConfigError("nothing chosen: give --agent, --session, --trace, --since, --older-than, or --all")
    where = _filter(agent, session, since, until, trace)
    engine = _open(config)
    if not yes:
        typer.confirm(f"Delete {_count(engine, where)} trace(s) for good?", abort=True)
    deleted = delete_all(engine, where)
    report = asdict(deleted) | {"learned_by": _learned_by(engine, deleted.sent)}
    del report["sent"]
    if as_json:
        typer.echo(json.dumps(report, indent=2))
        return
    for name, value in report.items():
        typer.echo(f"{name:<11} {', '.join(value) or 'no version' if isinstance(value, list) else value}")


def _learned_by(engine: Engine, deleted: Iterable[tuple[str, str]]) -> list[str]:
    """Names of the versions that have learned from these traces, which are pairs of agent and id."""
    from metaclaw_hooks.names import version_name

    from metaclaw_plugin.store.lineage import learned_from

    of_agent: dict[str, set[str]] = {}
    for agent, trace in deleted:
        of_agent.setdefault(agent, set()).add(trace)
    with engine.connect() as c:
        return [
            version_name(agent, number)
            for agent, traces in sorted(of_agent.items())
            for number in learned_from(c, agent, traces)
        ]


def parse_time(text: str, now: float) -> float:
    """``2026-11-22``, ``2026-11-22T10:00`` (UTC unless it says otherwise) or an age such as ``7d`` -> Unix seconds.

    Raises:
        ConfigError: if it is neither.
    """
    from metaclaw_plugin.errors import ConfigError

    if match := _AGE.fullmatch(text.strip()):
        return now - int(match[1]) * _SECONDS[match[2]]
    try:
        found = datetime.fromisoformat(text.strip())
    except ValueError as error:
        raise ConfigError(f"{text!r} is no time; write 2026-11-22, 2026-11-22T10:00, or an age such as 7d") from error
    return (found if found.tzinfo else found.replace(tzinfo=UTC)).timestamp()


def _filter(
    agent: str | None, session: str | None, since: str | None, until: str | None, trace: str | None = None
) -> TraceFilter:
    from metaclaw_plugin.store.traces import TraceFilter

    now = time.time()
    return TraceFilter(
        agent=agent,
        session=session,
        id=trace,
        since=None if since is None else parse_time(since, now),
        until=None if until is None else parse_time(until, now),
    )


def _open(config: Path | None) -> Engine:
    from metaclaw_plugin.settings import find_config, load_settings
    from metaclaw_plugin.store.engine import open_store

    return open_store(load_settings(find_config(config)).store_url)


def _count(engine: Engine, where: TraceFilter) -> int:
    import sqlalchemy as sa

    from metaclaw_plugin.store import schema

    with engine.connect() as c:
        query = sa.select(sa.func.count()).select_from(schema.traces).where(*where.conditions())
        return int(c.execute(query).scalar_one())


@contextmanager
def _writing(output: Path | None) -> Iterator[TextIO]:
    if output is None:
        yield sys.stdout
        return
    with output.open("w", encoding="utf-8") as file:
        yield file


def _write_lines(file: TextIO, records: Iterable[dict[str, Any]]) -> None:
    try:
        for record in records:
            file.write(json.dumps(record, separators=(",", ":")) + "\n")
        file.flush()
    except BrokenPipeError:  # the reader, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains when it flushes at exit
