"""What the supervisor leaves in METACLAW_HOME: one lock, and one file that says what it runs."""

from __future__ import annotations

import fcntl
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import psutil

from metaclaw_plugin.errors import ProcessError

Phase = Literal["planned", "starting", "ready", "waiting", "stopped"]


@dataclass(frozen=True)
class ServiceState:
    """One service, as it was at the last change. ``pid`` and ``created`` are those of its guard."""

    name: str
    phase: Phase
    pid: int | None = None
    created: float | None = None  # psutil's create time: with the pid, an identity that is never reused
    port: int | None = None
    restarts: int = 0
    since: float = 0.0  # seconds since the epoch
    detail: str = ""


@dataclass(frozen=True)
class SupervisorState:
    """The file ``run/supervisor.json``."""

    pid: int
    created: float
    config: str | None
    started_at: float
    services: tuple[ServiceState, ...] = ()
    only: tuple[str, ...] = ()  # the processes that were asked for; none: all
    failure: str | None = None  # why the start failed; set just before it ends

    def alive(self) -> bool:
        """Whether the supervisor that wrote this still runs."""
        return same_process(self.pid, self.created)


@dataclass(frozen=True)
class Home:
    """The folders of METACLAW_HOME that processes use."""

    path: Path
    run: Path = field(init=False)
    logs: Path = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "run", self.path / "run")
        object.__setattr__(self, "logs", self.path / "logs")

    @property
    def state_file(self) -> Path:
        return self.run / "supervisor.json"

    def log(self, name: str) -> Path:
        return self.logs / f"{name}.log"

    def create(self) -> None:
        """Make the folders, for this user alone.

        Raises:
            ProcessError: if that cannot be done.
        """
        try:
            for folder in (self.path, self.run, self.logs):
                folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            with tempfile.TemporaryFile(dir=self.run):
                pass
        except OSError as error:
            raise ProcessError(
                f"cannot write to {self.path}: {error.strerror}; set METACLAW_HOME to a folder that is yours"
            ) from error

    def read(self) -> SupervisorState | None:
        """What was written last; ``None`` if nothing was.

        Raises:
            ProcessError: if the file is there but not ours.
        """
        try:
            data: dict[str, Any] = json.loads(self.state_file.read_text(encoding="utf-8"))
            services = tuple(ServiceState(**item) for item in data.pop("services"))
            only = tuple(data.pop("only", ()))
            return SupervisorState(**data, services=services, only=only)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise ProcessError(f"cannot read {self.state_file}: {error}; remove it if no MetaClaw runs") from error

    def write(self, state: SupervisorState) -> None:
        """Replace the file in one step."""
        part = self.state_file.with_suffix(f".{os.getpid()}.part")
        part.write_text(json.dumps(asdict(state), indent=1) + "\n", encoding="utf-8")
        part.replace(self.state_file)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Held as long as a supervisor runs; the kernel gives it back when it dies, however it dies.

        Raises:
            ProcessError: if another supervisor holds it.
        """
        with (self.run / "supervisor.lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                state = self.read()
                who = f" (process {state.pid})" if state and state.alive() else ""
                raise ProcessError(
                    f"MetaClaw already runs for {self.path}{who}; `metaclaw status` shows it, `metaclaw stop` ends it"
                ) from error
            yield


def created_at(pid: int) -> float | None:
    """psutil's create time of a process; ``None`` if it is gone."""
    try:
        return psutil.Process(pid).create_time()
    except psutil.NoSuchProcess:
        return None


def same_process(pid: int, created: float) -> bool:
    """Whether ``pid`` is still the process that was created then, and no zombie."""
    try:
        process = psutil.Process(pid)
        return abs(process.create_time() - created) < 0.05 and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
