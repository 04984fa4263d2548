"""``metaclaw agents set``: settings of one agent that go before the global ones."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from metaclaw_plugin.cli.options import AsJson, Config

if TYPE_CHECKING:
    from metaclaw_plugin.settings import Section, Settings


def set_(
    name: Annotated[str, typer.Argument(help="The agent.", metavar="NAME")],
    changes: Annotated[
        list[str] | None,
        typer.Argument(
            help="Such as publish.policy=better; sections: publish, windows, rewards. Without a value: no longer set.",
            metavar="[SETTING=VALUE]...",
        ),
    ] = None,
    as_json: AsJson = False,
    config: Config = None,
) -> None:
    """Show or change what is set for an agent alone: its gate, its windows, its rewards.

    Values are written as in the configuration file, which says what there is to set. The worker follows within seconds.
    """
    from metaclaw_plugin.settings import find_config, load_settings
    from metaclaw_plugin.store.agents import get_record, set_settings
    from metaclaw_plugin.store.engine import open_store

    settings = load_settings(find_config(config))
    engine = open_store(settings.store_url)
    try:
        with engine.begin() as c:
            own = {key: dict(value) for key, value in get_record(c, name).settings.items()}
            for change in changes or ():
                _change(own, change, settings)
            own = {section: values for section, values in own.items() if values}
            if changes:
                set_settings(c, name, own)
    finally:
        engine.dispose()
    if as_json:
        typer.echo(json.dumps(own, indent=2))
        return
    for section, values in sorted(own.items()):
        for key, value in sorted(values.items()):
            typer.echo(f"{section}.{key}={json.dumps(value)}")
    if not own:
        typer.echo(f"nothing is set for {name} alone")


def _change(own: dict[str, dict[str, Any]], change: str, settings: Settings) -> None:
    """Carry out one ``section.key=value``.

    Raises:
        ConfigError: if there is no such setting, or the value does not fit it.
    """
    import yaml

    from metaclaw_plugin.errors import ConfigError
    from metaclaw_plugin.settings import WindowSettings
    from metaclaw_plugin.worker.modes import with_own
    from metaclaw_plugin.worker.windows import check_windows

    path, equals, text = change.partition("=")
    section, _, key = path.partition(".")
    known: dict[str, Section] = {
        "publish": settings.publish,
        "windows": settings.windows,
        "rewards": settings.rewards,
    }
    if section not in known or key not in type(known[section]).model_fields or not equals:
        names = ", ".join(known)
        raise ConfigError(f"{change!r} is no setting of an agent: write SECTION.NAME=VALUE, SECTION one of {names}")
    values = own.setdefault(section, {})
    if not text:
        values.pop(key, None)
        return
    try:
        values[key] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{change!r}: the value cannot be read as YAML") from error
    checked = with_own(known[section], values)
    if isinstance(checked, WindowSettings):
        check_windows(checked)
