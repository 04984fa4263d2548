"""``metaclaw mode``: the mode of all agents that have none of their own, while everything runs."""

from __future__ import annotations

from typing import Annotated

import typer

from metaclaw_plugin.cli.options import Config

app = typer.Typer(rich_markup_mode=None)
MODES = "off (pass through), skills_only, rl (train when a batch is full), auto (train in windows)"


@app.command()
def mode(
    value: Annotated[
        str | None, typer.Argument(help=f"{MODES}, or default: the configured one.", metavar="[MODE]")
    ] = None,
    config: Config = None,
) -> None:
    """Show or set the mode of all agents that have none of their own; it counts from the next request on.

    What is set here goes before `metaclaw.mode` of the configuration until `default` is given. `metaclaw agents mode`
    sets it for one agent.
    """
    from metaclaw_hooks.types import Mode

    from metaclaw_plugin.errors import ConfigError
    from metaclaw_plugin.settings import find_config, load_settings
    from metaclaw_plugin.store.agents import get_global_mode, set_global_mode
    from metaclaw_plugin.store.engine import open_store
    from metaclaw_plugin.supervisor.plan import trains

    settings = load_settings(find_config(config))
    if value not in {None, "default", *Mode}:
        raise ConfigError(f"{value!r} is no mode; the modes are {', '.join(Mode)}")
    engine = open_store(settings.store_url)
    try:
        with engine.begin() as c:
            if value is not None:
                set_global_mode(c, None if value == "default" else Mode(value))
            found = get_global_mode(c)
    finally:
        engine.dispose()
    typer.echo((found or settings.mode).value + ("" if found else " (configured)"))
    if found in (Mode.RL, Mode.AUTO) and not trains(settings):
        typer.echo("`metaclaw start` starts the trainer here only if metaclaw.mode in the configuration is rl or auto")
