"""How a start or an end looks: a line for each process on a terminal, a line for each change in a file."""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import TracebackType

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from metaclaw_plugin.supervisor.child import Child
from metaclaw_plugin.supervisor.state import ServiceState

WORDS = {
    "planned": "waiting",
    "starting": "starting",
    "ready": "ready",
    "waiting": "died, starts again soon",
    "stopped": "ended",
}


class StartDisplay:
    """A context manager; feed it states as they change. Times run until a process is ready or ended."""

    def __init__(self, names: Sequence[str], title: str = "Starting") -> None:
        self._console = Console(stderr=True)
        self._live = self._console.is_terminal
        self._title = title
        self._final = "ready" if title == "Starting" else "stopped"
        self._began = time.monotonic()
        self._shown: dict[str, str] = {}
        self._progress = Progress(
            SpinnerColumn(finished_text="[green]✓[/green]"),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
            TextColumn("[dim]{task.fields[detail]}[/dim]"),
            console=self._console,
            disable=not self._live,
        )
        self._tasks: dict[str, TaskID] = {}
        for name in names:
            self._tasks[name] = self._progress.add_task(f"{name:<8} waiting", total=1, detail="")

    def __enter__(self) -> StartDisplay:
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._progress.stop()

    def show_children(self, children: Sequence[Child]) -> None:
        """Show the children as they are, those that start with the newest line of their log."""
        for child in children:
            detail = child.state.detail
            if self._live and not detail and child.state.phase == "starting":
                detail = child.last_line()
            self._show(child.state, detail)

    def show_states(self, states: Sequence[ServiceState]) -> None:
        """Show states that were read from the supervisor's file."""
        for state in states:
            self._show(state, state.detail)

    def _show(self, state: ServiceState, detail: str) -> None:
        task = self._tasks.get(state.name)
        if task is None:
            return
        word = WORDS[state.phase]
        if not self._live:
            if self._shown.get(state.name, WORDS["planned"]) != word:
                seconds = time.monotonic() - self._began
                self._console.print(f"{self._title.lower()}: {state.name} {word} ({seconds:.0f} s)", highlight=False)
            self._shown[state.name] = word
            return
        completed = 1 if state.phase == self._final else 0
        text = escape(detail[:100])
        self._progress.update(task, description=f"{state.name:<8} {word}", completed=completed, detail=text)
