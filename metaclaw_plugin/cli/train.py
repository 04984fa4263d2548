"""``metaclaw train``: take a step now."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from metaclaw_plugin.cli.options import Config

if TYPE_CHECKING:
    from metaclaw_hooks.wire import TrainReply

    from metaclaw_plugin.settings import RlSettings

app = typer.Typer(rich_markup_mode=None)


@app.command()
def train(
    agent: Annotated[str, typer.Argument(help="The agent to train.")],
    config: Config = None,
) -> None:
    """Take one training step now with the samples that wait, though the batch is not full and no window is open.

    The new version is judged and published like any other. Traffic is not disturbed.
    """
    import asyncio

    from metaclaw_plugin.errors import TrainingNotStartedError
    from metaclaw_plugin.settings import find_config, load_settings
    from metaclaw_plugin.store.agents import get_record
    from metaclaw_plugin.store.engine import open_store

    settings = load_settings(find_config(config))
    engine = open_store(settings.store_url)
    try:
        with engine.connect() as c:
            get_record(c, agent)
    finally:
        engine.dispose()
    reply = asyncio.run(_ask(settings.rl, agent))
    if not reply.started:
        raise TrainingNotStartedError(f"no step of {agent} was started: {reply.reason or 'the trainer gave no reason'}")
    typer.echo(f"a step of {agent} has been started; `metaclaw adapters list {agent}` shows the version it makes")


async def _ask(rl: RlSettings, agent: str) -> TrainReply:
    import httpx

    from metaclaw_plugin.trainer_client import TrainerClient

    async with httpx.AsyncClient(trust_env=False) as http:
        return await TrainerClient(http, rl.remote_url, rl.remote_api_key).train(agent)
