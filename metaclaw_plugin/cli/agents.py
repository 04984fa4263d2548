"""``metaclaw agents``: who is behind the gateway, and with which keys."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from metaclaw_plugin.cli.agent_keys import check_keys, make_key
from metaclaw_plugin.cli.agent_settings import set_
from metaclaw_plugin.cli.options import AsJson, Config

if TYPE_CHECKING:
    from sqlalchemy.engine import Engine

    from metaclaw_plugin.settings import Settings
    from metaclaw_plugin.store.agents import NewKey

app = typer.Typer(rich_markup_mode=None, no_args_is_help=True, help="Add agents and their keys, and see what they do.")
app.command("set")(set_)

Name = Annotated[str, typer.Argument(help="The agent: 1 to 63 of a-z, 0-9 and '-'.", metavar="NAME")]
MODES = "off (pass through), skills_only, rl (train when a batch is full) or auto (train in windows)"


@app.command()
def add(
    name: Name,
    mode: Annotated[str | None, typer.Option("--mode", help=f"{MODES}; unset: the global mode.")] = None,
    as_json: AsJson = False,
    config: Config = None,
) -> None:
    """Add an agent and make its first key, which is shown this once.

    Give the key to the agent's client, with the gateway as its base URL. With `metaclaw.gateway.admin_key` it is one of
    LiteLLM's virtual keys.
    """
    from metaclaw_plugin.store.agents import add_agent

    settings, engine = _open(config)
    chosen = _mode(mode)
    check_keys(settings, config)
    with engine.begin() as c:
        add_agent(c, name, chosen)
    _print_key(settings, make_key(settings, engine, [name]), name, as_json)


@app.command("list")
def list_(as_json: AsJson = False, config: Config = None) -> None:
    """List all agents: mode, keys, skill generation, owner."""
    from metaclaw_plugin.store.agents import list_agents, list_keys

    settings, engine = _open(config)
    with engine.connect() as c:
        keys = list_keys(c)
        rows = [
            {
                "agent": record.name,
                "mode": record.effective_mode(settings.mode).value,
                "mode_set": record.mode is not None,
                "keys": sum(record.name in key.agents for key in keys),
                "skill_generation": record.skill_generation,
                "recorded": record.record,
                "owner": record.owner,
                "created_at": record.created_at,
            }
            for record in list_agents(c)
        ]
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    if not rows:
        typer.echo("no agents yet; `metaclaw agents add NAME` adds one")
        return
    _print_table(rows, ("agent", "mode", "keys", "skill_generation", "recorded", "owner"))


@app.command()
def remove(
    name: Name,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    traces: Annotated[bool, typer.Option("--traces", help="Delete its traces as well.")] = False,
    skills: Annotated[
        bool, typer.Option("--skills", help="Delete its own skills as well, the retired and the proposed too.")
    ] = False,
    config: Config = None,
) -> None:
    """Remove an agent, and revoke the keys that acted for it alone.

    Its traces and its own skills stay, unless --traces and --skills are given: an agent that is added under this name
    has them. `metaclaw traces delete --agent NAME` deletes the traces later.
    """
    from metaclaw_plugin.skills.editing import SkillFolder
    from metaclaw_plugin.store.agents import get_record, remove_agent
    from metaclaw_plugin.store.deletion import delete_all
    from metaclaw_plugin.store.traces import TraceFilter

    settings, engine = _open(config)
    with engine.connect() as c:
        get_record(c, name)
    if not yes:
        also = [word for word, wanted in (("traces", traces), ("skills", skills)) if wanted]
        typer.confirm(f"Remove the agent {name}{' and all of its ' + ' and '.join(also) if also else ''}?", abort=True)
    with engine.begin() as c:
        keys = remove_agent(c, name)
    deleted = delete_all(engine, TraceFilter(agent=name)).traces if traces else 0
    typer.echo(f"removed {name}, {keys} key(s) and {deleted} trace(s)")
    folder = SkillFolder(settings.skills_path, name)
    if skills:
        folder.delete()
        typer.echo("its own skills are deleted")
    elif folder.is_there:
        typer.echo(f"its own skills stay in {settings.skills_path / name}: an agent added as {name} will have them")


@app.command()
def keys(
    name: Name,
    new: Annotated[bool, typer.Option("--new", help="Make one more key; it is shown this once.")] = False,
    also: Annotated[
        list[str] | None, typer.Option("--also", help="With --new: a further agent that the key may choose.")
    ] = None,
    revoke: Annotated[str | None, typer.Option("--revoke", help="Revoke the key with this id.", metavar="ID")] = None,
    as_json: AsJson = False,
    config: Config = None,
) -> None:
    """List an agent's keys, make one more, or revoke one.

    A key made with --also acts for several agents: the first one, unless the client sends x-agent-id.
    """
    from metaclaw_plugin.errors import UnknownKeyError
    from metaclaw_plugin.store.agents import get_record, list_keys, revoke_key

    settings, engine = _open(config)
    if new:
        check_keys(settings, config)
        _print_key(settings, make_key(settings, engine, [name, *(also or [])]), name, as_json)
        return
    if revoke is not None:
        with engine.begin() as c:
            if revoke not in {key.id for key in list_keys(c, name)}:
                raise UnknownKeyError(f"agent {name!r} has no valid key {revoke!r}; `metaclaw agents keys {name}`")
            revoke_key(c, revoke)
    with engine.connect() as c:
        get_record(c, name)
        rows = [
            {"id": key.id, "ends_in": key.hint, "agents": list(key.agents), "created_at": key.created_at}
            for key in list_keys(c, name)
        ]
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
    elif rows:
        _print_table(rows, ("id", "ends_in", "agents"))
    else:
        typer.echo(f"{name} has no keys; `metaclaw agents keys {name} --new` makes one")
    if settings.gateway.admin_key and not as_json:
        typer.echo("its virtual keys are on LiteLLM's Virtual Keys page, to be revoked there")


@app.command()
def rotate(
    name: Name,
    key_id: Annotated[str | None, typer.Option("--key", help="Which key, if there are several.", metavar="ID")] = None,
    as_json: AsJson = False,
    config: Config = None,
) -> None:
    """Replace an agent's key: the new one is shown this once, the old one is refused within seconds."""
    from metaclaw_plugin.errors import UnknownKeyError
    from metaclaw_plugin.store.agents import get_record, list_keys, rotate_key

    settings, engine = _open(config)
    with engine.begin() as c:
        get_record(c, name)
        ids = [key.id for key in list_keys(c, name)]
        if key_id is None and len(ids) != 1:
            raise UnknownKeyError(f"{name} has {len(ids)} keys; say which with --key ({', '.join(ids) or 'none'})")
        if key_id is not None and key_id not in ids:
            raise UnknownKeyError(f"agent {name!r} has no valid key {key_id!r}; `metaclaw agents keys {name}`")
        key = rotate_key(c, key_id or ids[0])
    _print_key(settings, key, name, as_json)


@app.command()
def mode(
    name: Name,
    value: Annotated[str | None, typer.Argument(help=f"{MODES}, or default.", metavar="[MODE]")] = None,
    config: Config = None,
) -> None:
    """Show or set an agent's mode; `default` makes it follow the global one."""
    from metaclaw_plugin.store.agents import get_record, set_mode

    settings, engine = _open(config)
    if value is not None:
        chosen = _mode(None if value == "default" else value)
        with engine.begin() as c:
            set_mode(c, name, chosen)
    with engine.connect() as c:
        record = get_record(c, name)
    typer.echo(record.effective_mode(settings.mode).value + ("" if record.mode else " (global)"))


@app.command()
def record(
    name: Name,
    value: Annotated[str | None, typer.Argument(help="on or off.", metavar="[on|off]")] = None,
    config: Config = None,
) -> None:
    """Show or set whether anything of an agent's traffic is kept. Off: it is answered, and nothing is stored."""
    from metaclaw_plugin.errors import ConfigError
    from metaclaw_plugin.store.agents import get_record, set_record

    _, engine = _open(config)
    if value not in {None, "on", "off"}:
        raise ConfigError(f"{value!r} is neither on nor off")
    with engine.begin() as c:
        if value is not None:
            set_record(c, name, value == "on")
        typer.echo("on" if get_record(c, name).record else "off")


@app.command()
def owner(
    name: Name,
    value: Annotated[
        str | None, typer.Argument(help="team:ID, user:ID or key:HASH of LiteLLM, or none.", metavar="[OWNER]")
    ] = None,
    config: Config = None,
) -> None:
    """Show or set which LiteLLM user or team an agent belongs to; `none`: whoever claims it next."""
    from metaclaw_plugin.errors import ConfigError
    from metaclaw_plugin.store.agents import get_record, set_owner

    _, engine = _open(config)
    if value is not None and value != "none" and value.split(":")[0] not in {"team", "user", "key"}:
        raise ConfigError(f"owner {value!r} is not of the form team:ID, user:ID or key:HASH")
    with engine.begin() as c:
        if value is not None:
            set_owner(c, name, None if value == "none" else value)
        typer.echo(get_record(c, name).owner or "none")


def _open(config: Path | None) -> tuple[Settings, Engine]:
    from metaclaw_plugin.settings import find_config, load_settings
    from metaclaw_plugin.store.engine import open_store

    settings = load_settings(find_config(config))
    return settings, open_store(settings.store_url)


def _mode(value: str | None) -> Any:
    from metaclaw_hooks.types import Mode

    from metaclaw_plugin.errors import ConfigError

    try:
        return None if value is None else Mode(value)
    except ValueError as error:
        raise ConfigError(f"{value!r} is no mode; the modes are {', '.join(Mode)}") from error


def _print_key(settings: Settings, key: NewKey, name: str, as_json: bool) -> None:
    url = f"http://{settings.gateway.host}:{settings.gateway.port}"
    if as_json:
        found = {
            "agent": name,
            "key": key.secret,
            "key_id": key.id,
            "base_url": f"{url}/v1",
            "model": f"metaclaw/{name}",
        }
        typer.echo(json.dumps(found, indent=2))
        return
    typer.echo(f"agent     {name}")
    typer.echo(f"key       {key.secret}   (shown this once; its id is {key.id})")
    typer.echo(f"base URL  {url}/v1   (Anthropic clients: {url})")
    typer.echo(f"model     metaclaw/{name}")


def _print_table(rows: list[dict[str, Any]], columns: tuple[str, ...]) -> None:
    cells = [[_cell(row[column]) for column in columns] for row in rows]
    widths = [max(len(column), *(len(line[i]) for line in cells)) for i, column in enumerate(columns)]
    for line in [list(columns), *cells]:
        typer.echo("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip())


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(value) if isinstance(value, list) else str(value)
