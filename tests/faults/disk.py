"""A folder on a disk of its own that can be full: a small tmpfs, where mounting is allowed.

Where it is not, the processes that write there are forbidden to make any file longer (RLIMIT_FSIZE), which SQLite and
the checkpoints meet in the same places.
"""

from __future__ import annotations

import os
import resource
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil

SIZE_MIB = 512
NONE_LEFT = 8192  # bytes: longest file while the disk is full, where nothing could be mounted


class Disk:
    """See the module."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._mounted = False
        self._limited: list[int] = []

    @contextmanager
    def mounted(self, small: bool = True) -> Iterator[None]:
        """The folder, for as long as the block runs; not ``small``: on the disk where it lies."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if small and os.geteuid() == 0:
            command = ["mount", "-t", "tmpfs", "-o", f"size={SIZE_MIB}m,mode=700", "tmpfs", str(self.folder)]
            self._mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
        try:
            yield
        finally:
            if self._mounted:
                subprocess.run(["umount", "--lazy", str(self.folder)], check=True)

    def fill(self, pids: Sequence[int]) -> None:
        """Leave no room; ``pids``: the processes that write here."""
        if not self._mounted:
            self._limited = list(pids)
            for pid in pids:
                resource.prlimit(pid, resource.RLIMIT_FSIZE, (NONE_LEFT, resource.RLIM_INFINITY))
            return
        with (self.folder / ".ballast").open("wb", buffering=0) as file:
            piece = bytes(2**20)
            while piece:
                try:
                    file.write(piece)
                except OSError:
                    piece = piece[: len(piece) // 2]

    @property
    def is_full(self) -> bool:
        """Whether nothing more can be written: tried on the disk, or read off the processes' limits."""
        if not self._mounted:
            limits = [
                resource.prlimit(pid, resource.RLIMIT_FSIZE)[0] for pid in self._limited if psutil.pid_exists(pid)
            ]
            return bool(limits) and all(limit == NONE_LEFT for limit in limits)
        probe = self.folder / ".probe"
        try:
            probe.write_bytes(bytes(NONE_LEFT))
        except OSError:
            return True
        finally:
            probe.unlink(missing_ok=True)
        return False

    def free(self) -> None:
        """Make room again."""
        (self.folder / ".ballast").unlink(missing_ok=True)
        for pid in self._limited:
            try:
                resource.prlimit(pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            except ProcessLookupError:
                continue  # it was killed meanwhile
        self._limited = []
