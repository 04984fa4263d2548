"""``metaclaw connect``: point clients at the gateway."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from metaclaw_plugin.cli.agent_keys import agents_behind, check_keys, make_key
from metaclaw_plugin.cli.options import Config
from metaclaw_plugin.errors import ConfigError

if TYPE_CHECKING:
    from sqlalchemy.engine import Engine

    from metaclaw_plugin.clients.openclaw import Change, Connection
    from metaclaw_plugin.settings import Settings

app = typer.Typer(rich_markup_mode=None, no_args_is_help=True, help="Point OpenClaw, or any client, at the gateway.")

DRY_KEY = "mc-made-when-it-is-run"


@app.command()
def openclaw(
    agent: Annotated[list[str] | None, typer.Option("--agent", help="Only this agent of OpenClaw; repeatable.")] = None,
    extension: Annotated[
        bool, typer.Option("--extension", help="Also load our OpenClaw extension, which tells of sessions' ends.")
    ] = False,
    undo: Annotated[bool, typer.Option("--undo", help="Take our entries out and put back what was there.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would change, and change nothing.")] = False,
    print_it: Annotated[bool, typer.Option("--print", help="Print the whole resulting configuration.")] = False,
    file: Annotated[Path | None, typer.Option("--file", help="openclaw.json; unset: where OpenClaw keeps it.")] = None,
    context_window: Annotated[
        int | None, typer.Option(min=1024, help="Context length in tokens; unset: the served model's.")
    ] = None,
    config: Config = None,
) -> None:
    """Edit OpenClaw's configuration so that its agents talk to the gateway, each with a key of its own.

    Only provider entries named metaclaw-AGENT and the agents' primary model are set (with --extension, our plugin too);
    a backup lies beside the file. Running it again changes nothing.
    """
    from metaclaw_plugin.clients import openclaw as claw
    from metaclaw_plugin.settings import find_config, load_settings

    settings = load_settings(find_config(config))
    path = file or claw.default_file()
    current = claw.read_file(path)
    if undo:
        _undo(settings, path, current, dry_run)
        return
    check_keys(settings, config)
    connections = _connections(settings, current, agent or claw.agents_in(current), context_window, dry_run)
    new, changes = claw.connect(current, connections, extension)
    if print_it:
        typer.echo(json.dumps(new, indent=2))
    if not changes:
        typer.echo(f"{path} points at the gateway already; nothing to change.")
        return
    for change in changes:
        if change.after != {}:
            typer.echo(f"{'would set' if dry_run else 'set'} {change.told()}")
    if not dry_run:
        _remember(settings, path, changes)
        typer.echo(f"backup: {claw.write_file(path, new)}")
        typer.echo("Restart OpenClaw's gateway to use it. `metaclaw connect openclaw --undo` takes it back.")


@app.command()
def show(
    client: Annotated[str, typer.Argument(help="openai, anthropic, claude-code, codex, env or curl.")],
    agent: Annotated[str, typer.Option("--agent", help="The agent to talk as.")] = "my-agent",
    key: Annotated[str, typer.Option("--key", help="Its key, as `metaclaw agents add` printed it.")] = "mc-...",
    config: Config = None,
) -> None:
    """Print what to paste into a client, such as: metaclaw connect show claude-code --agent NAME --key mc-..."""
    from metaclaw_plugin.clients.snippets import SNIPPETS, Target
    from metaclaw_plugin.settings import find_config, load_settings

    if client not in SNIPPETS:
        raise ConfigError(f"no snippet for {client!r}; there are: {', '.join(SNIPPETS)}")
    settings = load_settings(find_config(config))
    typer.echo(SNIPPETS[client](Target(gateway_url(settings), agent, key)), nl=False)


def gateway_url(settings: Settings) -> str:
    """Root URL of the gateway, as clients of this machine reach it."""
    from metaclaw_plugin.supervisor.plan import reachable

    return f"http://{reachable(settings.gateway.host)}:{settings.gateway.port}"


def _connections(
    settings: Settings, current: dict[str, Any], agents: list[str], context: int | None, dry_run: bool
) -> list[Connection]:
    from metaclaw_hooks.names import slug

    from metaclaw_plugin.clients.openclaw import SMALLEST_CONTEXT, Connection, key_in
    from metaclaw_plugin.store.engine import open_store

    window = context or _served_context(settings)
    if window < SMALLEST_CONTEXT:
        typer.echo(
            f"warning: the served model has a context of {window} tokens, and OpenClaw's own prompt is about 19,000; "
            "take a model with more, or raise metaclaw.vllm.max_model_len",
            err=True,
        )
    for name in agents:
        slug(name, "agent")
    url = gateway_url(settings)
    tokens = min(8192, window // 4)
    if dry_run:
        return [Connection(name, url, key_in(current, name) or DRY_KEY, window, tokens) for name in agents]
    engine = open_store(settings.store_url)
    try:
        return [Connection(name, url, _key(settings, engine, current, name), window, tokens) for name in agents]
    finally:
        engine.dispose()


def _key(settings: Settings, engine: Engine, current: dict[str, Any], agent: str) -> str:
    """The key that OpenClaw has for ``agent``, if it is still good; else a new one, and the agent if it is new."""
    from metaclaw_plugin.clients.openclaw import key_in
    from metaclaw_plugin.errors import AgentExistsError
    from metaclaw_plugin.store.agents import add_agent

    present = key_in(current, agent)
    if present is not None and agent in agents_behind(settings, engine, present):
        return present
    with suppress(AgentExistsError), engine.begin() as c:
        add_agent(c, agent)
    return make_key(settings, engine, [agent]).secret


def _served_context(settings: Settings) -> int:
    """Tokens that the served model can hold, as far as its own configuration says."""
    if settings.vllm.max_model_len is not None:
        return settings.vllm.max_model_len
    described = Path(settings.base_model or "").expanduser() / "config.json"
    if settings.base_model and described.is_file():
        found = json.loads(described.read_text(encoding="utf-8")).get("max_position_embeddings")
        if isinstance(found, int):
            return found
    return 32768


def _record(settings: Settings) -> Path:
    return settings.home / "connect" / "openclaw.json"


def _remember(settings: Settings, path: Path, changes: list[Change]) -> None:
    """Write down what is about to change, after what was changed before, for this user's eyes alone."""
    record = _record(settings)
    record.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    earlier = _recorded(settings, path)
    body = {"file": str(path.absolute()), "changes": [asdict(change) for change in [*earlier, *changes]]}
    record.touch(mode=0o600)
    record.write_text(json.dumps(body, indent=1), encoding="utf-8")


def _recorded(settings: Settings, path: Path) -> list[Change]:
    from metaclaw_plugin.clients.openclaw import Change

    record = _record(settings)
    if not record.is_file():
        return []
    body = json.loads(record.read_text(encoding="utf-8"))
    if body["file"] != str(path.absolute()):
        return []
    return [Change(tuple(item["path"]), item["before"], item["absent"], item["after"]) for item in body["changes"]]


def _undo(settings: Settings, path: Path, current: dict[str, Any], dry_run: bool) -> None:
    from metaclaw_plugin.clients import openclaw as claw

    changes = _recorded(settings, path)
    if not changes:
        typer.echo(f"Nothing of ours is in {path}.")
        return
    new, notes = claw.disconnect(current, changes)
    for note in notes:
        typer.echo(note)
    if dry_run:
        typer.echo(f"would take back {len(changes) - len(notes)} changes in {path}")
        return
    backup = claw.write_file(path, new)
    _record(settings).unlink()
    typer.echo(f"took back {len(changes) - len(notes)} changes in {path} (backup: {backup}); the keys stay valid:")
    typer.echo("`metaclaw agents keys` lists them and revokes one.")
