"""``metaclaw gateway | worker | trainer | vllm | console``: one process each, in the foreground."""

from __future__ import annotations

from typing import Annotated

import typer

from metaclaw_plugin.cli.options import Config, Port

app = typer.Typer(rich_markup_mode=None)


@app.command()
def gateway(config: Config = None, port: Port = None) -> None:
    """Run the gateway in the foreground: the LiteLLM proxy with our callback.

    Agents talk to it at http://127.0.0.1:4000/v1 (OpenAI) or http://127.0.0.1:4000 (Anthropic).
    """
    from metaclaw_plugin.settings import find_config, load_settings
    from metaclaw_plugin.supervisor.checks import check_ports
    from metaclaw_plugin.supervisor.plan import gateway_service

    path = find_config(config)
    service = gateway_service(load_settings(path), path, port)
    check_ports([service])  # LiteLLM would take another port in silence
    service.launch.replace_this_process()


@app.command()
def worker(config: Config = None) -> None:
    """Run the worker in the foreground: it scores traces, forwards samples and publishes adapters."""
    from metaclaw_plugin.settings import find_config, load_settings
    from metaclaw_plugin.supervisor.plan import worker_launch

    path = find_config(config)
    worker_launch(load_settings(path), path).replace_this_process()


@app.command()
def trainer(
    config: Config = None,
    port: Port = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on; anything but loopback needs a key.")] = None,
    new_key: Annotated[
        str | None, typer.Option(metavar="NAME", help="Make an API key, print it once, and end.")
    ] = None,
    keys: Annotated[bool, typer.Option("--keys", help="List the API keys, without their secrets, and end.")] = False,
    revoke_key: Annotated[str | None, typer.Option(metavar="ID", help="Revoke an API key, and end.")] = None,
) -> None:
    """Run the trainer in the foreground, on the machine that has the GPU (or on this one's CPU).

    It needs the extra `trainer`. A worker elsewhere reaches it by metaclaw.rl.remote_url and a key made here with
    --new-key, which goes into metaclaw.rl.remote_api_key there.
    """
    from metaclaw_plugin.launch import Launch
    from metaclaw_plugin.settings import find_config, load_settings
    from metaclaw_plugin.supervisor.plan import trainer_launch

    path = find_config(config)
    launch = trainer_launch(load_settings(path), path, port)
    more = [*(("--host", host) if host else ()), *(("--new-key", new_key) if new_key else ())]
    more += [*(("--keys",) if keys else ()), *(("--revoke-key", revoke_key) if revoke_key else ())]
    Launch((*launch.argv, *more), launch.env).replace_this_process()


@app.command()
def vllm(config: Config = None, port: Port = None) -> None:
    """Run vLLM in the foreground with metaclaw.base_model, LoRA on, and adapters loadable at run time."""
    from metaclaw_plugin.settings import find_config, load_settings
    from metaclaw_plugin.supervisor.checks import check_ports
    from metaclaw_plugin.supervisor.plan import vllm_service

    service = vllm_service(load_settings(find_config(config)), port)
    check_ports([service])  # vLLM would tell of it only after a minute
    service.launch.replace_this_process()


@app.command()
def console(
    config: Config = None,
    port: Port = None,
    key: Annotated[bool, typer.Option("--key", help="Print the key that opens it, and end.")] = False,
) -> None:
    """Run the console in the foreground: web pages that show what every agent learned, and let you steer it.

    Open http://127.0.0.1:4020 and sign in with the key that --key prints, or choose MetaClaw in LiteLLM's admin UI.
    """
    from metaclaw_plugin.settings import find_config, load_settings
    from metaclaw_plugin.supervisor.checks import check_ports
    from metaclaw_plugin.supervisor.plan import console_service

    path = find_config(config)
    settings = load_settings(path)
    if key:
        from metaclaw_plugin.console.keys import console_key

        typer.echo(console_key(settings))
        return
    service = console_service(settings, path, port)
    check_ports([service])
    service.launch.replace_this_process()
