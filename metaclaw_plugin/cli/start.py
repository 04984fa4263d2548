"""``metaclaw start | stop | restart``: the processes of this machine, supervised."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from metaclaw_plugin.cli.options import Config

if TYPE_CHECKING:
    from metaclaw_plugin.settings import Settings
    from metaclaw_plugin.supervisor.state import Home, SupervisorState

app = typer.Typer(rich_markup_mode=None)


@app.command()
def start(
    config: Config = None,
    detach: Annotated[bool, typer.Option("--detach", "-d", help="Go on in the background once all is ready.")] = False,
    only: Annotated[
        list[str] | None,
        typer.Option(help="Only this process; repeatable: --only vllm --only trainer on a GPU server."),
    ] = None,
) -> None:
    """Start all that the configuration asks for here, show when each is ready, and watch over it until Ctrl-C.

    What dies is started again; what dies before it was ready ends the start with the reason. Logs are in
    METACLAW_HOME/logs.
    """
    if detach:
        _start_detached(config, only or [])
    else:
        _start_here(config, only or [])


@app.command()
def stop(config: Config = None) -> None:
    """End everything that `metaclaw start` started. Nobody else's process is touched."""
    if not _stop(config):
        typer.echo("MetaClaw does not run.")


@app.command()
def restart(config: Config = None) -> None:
    """Stop, then start again in the background, with the configuration as it is now."""
    from metaclaw_plugin.supervisor.state import Home

    settings, path = _load(config)
    state = Home(settings.home).read()
    if config is None and state is not None and state.config is not None:
        path = Path(state.config)
    _stop(config)
    _start_detached(path, list(state.only) if state is not None else [])


def _load(config: Path | None) -> tuple[Settings, Path | None]:
    from metaclaw_plugin.settings import find_config, load_settings

    path = find_config(config)
    return load_settings(path), path


def _start_here(config: Path | None, only: list[str]) -> None:
    from metaclaw_plugin.cli.start_display import StartDisplay
    from metaclaw_plugin.supervisor.plan import plan
    from metaclaw_plugin.supervisor.state import Home
    from metaclaw_plugin.supervisor.supervise import Supervisor

    settings, path = _load(config)
    services = plan(settings, path, only)
    home = Home(settings.home)
    home.create()
    with home.lock(), Supervisor(services, home, path, only) as supervisor:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, lambda *_: supervisor.ask_to_stop())
        with StartDisplay([service.name for service in services]) as display:
            ready = supervisor.start(display.show_children)
        if ready:
            typer.echo(_ready_text(settings, [service.name for service in services]))
            supervisor.run()
        with StartDisplay([service.name for service in services], "Ending") as display:
            supervisor.stop(display.show_children)
    if not ready:
        raise typer.Exit(130)  # interrupted before it was ready


def _ready_text(settings: Settings, names: Collection[str]) -> str:
    from metaclaw_plugin.supervisor.plan import reachable

    console = settings.console
    pages = f" Console: http://{reachable(console.host)}:{console.port}." if "console" in names else ""
    if "gateway" not in names:
        return f"Ready: {', '.join(names)}. Ctrl-C or `metaclaw stop` ends it."

    url = f"http://{reachable(settings.gateway.host)}:{settings.gateway.port}"
    return f"Ready. Gateway: {url}/v1 (OpenAI), {url} (Anthropic).{pages} Ctrl-C or `metaclaw stop` ends it."


def _start_detached(config: Path | None, only: list[str]) -> None:
    """Start a supervisor of its own session and show how it gets on, until it is ready or has failed."""
    from metaclaw_plugin.cli.start_display import StartDisplay
    from metaclaw_plugin.errors import ProcessError
    from metaclaw_plugin.supervisor.plan import plan
    from metaclaw_plugin.supervisor.state import Home

    settings, path = _load(config)
    services = plan(settings, path, only)
    home = Home(settings.home)
    home.create()
    with home.lock():  # fails here, and not in the background, if one runs already
        home.state_file.unlink(missing_ok=True)
    command = [sys.executable, "-m", "metaclaw_plugin.cli.main", "start"]
    if path is not None:
        command += ["--config", str(path.absolute())]
    for name in only:
        command += ["--only", name]
    with home.log("supervisor").open("ab") as output:
        offset = output.tell()
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        with StartDisplay([service.name for service in services]) as display:
            while process.poll() is None:
                state = home.read()
                if state is not None and state.pid == process.pid:
                    display.show_states(state.services)
                    if state.services and all(service.phase == "ready" for service in state.services):
                        break
                time.sleep(0.25)
    except KeyboardInterrupt:
        process.terminate()
        process.wait()
        raise
    if process.poll() is not None:
        from metaclaw_plugin.supervisor.diagnosis import explain, read_tail

        state = home.read()
        failure = state.failure if state else None
        raise ProcessError(failure or explain(read_tail(home.log("supervisor"), offset)).removeprefix("metaclaw: "))
    typer.echo(_ready_text(settings, [service.name for service in services]).replace("Ctrl-C or ", ""))


def _stop(config: Path | None) -> bool:
    """End the supervisor and wait for it; ``False`` if none runs."""
    from metaclaw_plugin.cli.start_display import StartDisplay
    from metaclaw_plugin.supervisor.state import Home

    settings, _ = _load(config)
    home = Home(settings.home)
    state = home.read()
    if state is None or not state.alive():
        return False
    os.kill(state.pid, signal.SIGTERM)
    with StartDisplay([service.name for service in state.services], "Ending") as display:
        _wait_until_gone(home, state, display.show_states)
    return True


def _wait_until_gone(home: Home, state: SupervisorState, show: object) -> None:
    """Until the supervisor has ended; it is killed when it takes longer than its services' patience allows."""
    deadline = time.monotonic() + 60.0 * max(1, len(state.services))
    while state.alive():
        if time.monotonic() > deadline:
            os.kill(state.pid, signal.SIGKILL)  # its guards notice and end the rest
            return
        now = home.read()
        if now is not None and callable(show):
            show(now.services)
        time.sleep(0.1)
