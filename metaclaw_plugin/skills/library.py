"""The library: ``skills/_shared/`` and ``skills/<agent>/``, read from disk, kept fresh while serving.

Files are the truth. A scan compares what lies on disk with what is in memory and reads only what changed; the result
is swapped in as one object, so a reader never sees half an update. A broken file keeps its place in the list of
problems and nothing else: the skill's last good state serves on until the file is mended or removed.
"""

from __future__ import annotations

import logging
import os
import stat
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from metaclaw_hooks.errors import InvalidNameError
from metaclaw_hooks.names import slug
from metaclaw_hooks.types import SkillRef

from metaclaw_plugin.errors import SkillError
from metaclaw_plugin.skills.skill_file import FILE_NAME, MAX_FILE, SHARED, Skill, parse_skill

log = logging.getLogger(__name__)

MAX_SKILLS = 5_000  # in one owner's folder

_Stamp = tuple[int, int, int, int]  # mtime_ns, ctime_ns, size, inode


@dataclass(frozen=True, slots=True)
class Problem:
    """A file that could not be used."""

    owner: str
    name: str  # of the folder
    message: str


@dataclass(frozen=True, slots=True)
class View:
    """All that one agent can use: the shared skills, shadowed by its own of the same name."""

    agent: str
    skills: Mapping[str, Skill]

    def resolve(self, refs: Iterable[SkillRef]) -> tuple[Skill, ...]:
        """The skills that ``refs`` name, in order; names that this agent has not are left out and logged."""
        found = []
        for ref in refs:
            skill = self.skills.get(ref.name)
            if skill is None:
                log.warning("agent %s: a select_skills hook named %r, which it has not", self.agent, ref.name)
            else:
                found.append(skill)
        return tuple(found)


@dataclass(frozen=True, slots=True)
class _Entry:
    stamp: _Stamp
    skill: Skill | None  # the last good state
    problem: str | None


@dataclass(frozen=True)
class _State:
    """One scan's outcome; never changed after it is swapped in."""

    owners: Mapping[str, Mapping[str, _Entry]] = field(default_factory=dict)
    views: dict[str, View] = field(default_factory=dict)  # filled on demand; a lost race makes an equal one


class Library:
    """The skills under ``root``. ``refresh`` may run in any thread; ``view`` costs a dictionary look-up."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._state = _State()
        self._lock = threading.Lock()  # one scan at a time
        self._root_gone = False
        self._counts: Counter[tuple[str, str]] = Counter()
        self.refresh()

    @property
    def root(self) -> Path:
        return self._root

    def view(self, agent: str) -> View:
        """What ``agent`` can use. The same object comes back until one of its skills changes."""
        state = self._state
        view = state.views.get(agent)
        if view is None:
            merged = _good(state.owners.get(SHARED, {})) | _good(state.owners.get(agent, {}))
            view = View(agent, merged)
            state.views[agent] = view
        return view

    def owners(self) -> list[str]:
        """``_shared`` and the agents that have a folder."""
        return sorted(self._state.owners)

    def skills_of(self, owner: str) -> dict[str, Skill]:
        """The skills in one owner's folder alone."""
        return _good(self._state.owners.get(owner, {}))

    def problems(self) -> list[Problem]:
        """Every file that cannot be used, with its cause."""
        return [
            Problem(owner, name, entry.problem)
            for owner, entries in sorted(self._state.owners.items())
            for name, entry in sorted(entries.items())
            if entry.problem is not None
        ]

    def take_counts(self) -> dict[tuple[str, str], int]:
        """What was counted since the last call, as (counter, label) -> number; for the store's counters."""
        with self._lock:
            counts, self._counts = dict(self._counts), Counter()
        return counts

    def refresh(self) -> bool:
        """Look at the disk; True if anything changed."""
        with self._lock:
            return self._refresh()

    def _refresh(self) -> bool:
        before = self._state
        try:
            names = [entry.name for entry in os.scandir(self._root) if entry.is_dir(follow_symlinks=False)]
        except OSError as error:
            if before.owners and not self._root_gone:
                log.error("skills: cannot read %s (%s); the library stays as it was", self._root, error.strerror)
                self._counts["skill_library_unreadable", error.strerror or "unknown"] += 1
            self._root_gone = True
            return False
        self._root_gone = False
        owners: dict[str, Mapping[str, _Entry]] = {}
        for name in sorted(names):
            if not _is_owner(name):
                continue
            known = before.owners.get(name, {})
            entries = self._scan_owner(name, known)
            owners[name] = known if entries == known else entries
        everyone = owners.keys() | before.owners.keys()
        changed = {name for name in everyone if owners.get(name) is not before.owners.get(name)}
        if not changed:
            return False
        for name in sorted(before.owners.keys() - owners.keys()):
            log.warning("skills: the folder of %s is gone, and its %d skills with it", name, len(before.owners[name]))
        kept = {} if SHARED in changed else {a: v for a, v in list(before.views.items()) if a not in changed}
        self._state = _State(owners, kept)
        return True

    def _scan_owner(self, owner: str, known: Mapping[str, _Entry]) -> dict[str, _Entry]:
        folder = self._root / owner
        try:
            names = sorted(entry.name for entry in os.scandir(folder) if not entry.name.startswith("."))
        except OSError as error:
            log.error("skills: cannot read %s (%s); its skills stay as they were", folder, error.strerror)
            self._counts["skill_library_unreadable", error.strerror or "unknown"] += 1
            return dict(known)
        if len(names) > MAX_SKILLS:
            log.error("skills: %s holds %d entries; only the first %d are read", folder, len(names), MAX_SKILLS)
            self._counts["skill_library_too_large", owner] += 1
        entries: dict[str, _Entry] = {}
        for name in names[:MAX_SKILLS]:
            entry = self._read(owner, f"{folder}/{name}", name, known.get(name))
            if entry is not None:
                entries[name] = entry
        return entries

    def _read(self, owner: str, folder: str, name: str, known: _Entry | None) -> _Entry | None:
        """The entry of one folder; ``None`` if there is no skill in it at all."""
        stamp: _Stamp = (0, 0, 0, 0)
        try:
            status = os.stat(f"{folder}/{FILE_NAME}")  # noqa: PTH116 - a Path costs more than the look itself
            stamp = (status.st_mtime_ns, status.st_ctime_ns, status.st_size, status.st_ino)
            if known is not None and known.stamp == stamp:
                return known
            skill = parse_skill(_bytes(Path(folder), self._root, status), name, owner)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (SkillError, OSError) as error:
            cause = str(error) if isinstance(error, SkillError) else f"cannot be read: {error.strerror}"
            if known is not None and known.problem == cause:
                return known if known.stamp == stamp else _Entry(stamp, known.skill, cause)
            log.error("skill %s/%s: %s", owner, name, cause)
            self._counts["skill_files_broken", f"{owner}/{name}"[:200]] += 1
            return _Entry(stamp, known.skill if known else None, cause)
        return _Entry(stamp, skill, None)


def _bytes(folder: Path, root: Path, status: os.stat_result) -> bytes:
    path = folder / FILE_NAME
    if not path.resolve().is_relative_to(root.resolve() / folder.parent.name):
        raise SkillError("is a link out of its owner's folder; copy the skill instead")
    if not stat.S_ISREG(status.st_mode):
        raise SkillError(f"{FILE_NAME} is no regular file")
    if status.st_size > MAX_FILE:
        raise SkillError(f"{status.st_size:,} bytes, more than the {MAX_FILE:,} that a skill may have; split it")
    with path.open("rb") as file:
        return file.read(MAX_FILE + 1)


def _good(entries: Mapping[str, _Entry]) -> dict[str, Skill]:
    return {name: entry.skill for name, entry in entries.items() if entry.skill is not None}


def _is_owner(name: str) -> bool:
    if name == SHARED:
        return True
    try:
        slug(name)
    except InvalidNameError:
        return False
    return True


class Watcher:
    """Refreshes a library every ``interval`` seconds in a thread of its own, away from any event loop.

    ``afterwards`` is called after each look, in the same thread: to make the vectors of new skills, say.
    """

    def __init__(self, library: Library, interval: float, afterwards: Callable[[], object] | None = None) -> None:
        self._library = library
        self._interval = interval
        self._afterwards = afterwards
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="skills-watcher", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join(timeout=5)

    def _run(self) -> None:
        while not self._stop.wait(self._interval):
            try:
                self._library.refresh()
                if self._afterwards is not None:
                    self._afterwards()
            except Exception:  # the watcher must outlive anything that a strange file does
                log.exception("skills: looking at %s failed; trying again", self._library.root)
