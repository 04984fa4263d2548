"""What ``metaclaw status`` reads from the store: plain SQL that only reads.

SQLite is read with the standard library: `metaclaw status` answers in half a second, half of which importing
SQLAlchemy would take. Any other database is read through SQLAlchemy. The statements run on both.
"""

from __future__ import annotations

import json
import sqlite3
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

from metaclaw_plugin.errors import StoreError

SQLITE = "sqlite:///"
NEWEST = 200  # traces of an agent whose verdicts are looked at

Query = Callable[..., Sequence[Sequence[Any]]]
T = TypeVar("T")

_AGENTS = "SELECT name, mode FROM agents ORDER BY name"
_GLOBAL_MODE = "SELECT value FROM facts WHERE name = 'global_mode'"  # {"mode"}, set while running
_SERVING = "SELECT agent, version FROM routes"
_COUNTS = "SELECT agent, forward, score, COUNT(*) FROM traces GROUP BY agent, forward, score"
_CANDIDATES = "SELECT agent, COUNT(*) FROM adapters WHERE state = 'candidate' GROUP BY agent"
_VERDICTS = (
    "SELECT trainable, reason, COUNT(*) FROM "
    f"(SELECT trainable, reason FROM traces WHERE agent = :agent ORDER BY seq DESC LIMIT {NEWEST}) newest "
    "GROUP BY trainable, reason"
)
_HEARTBEAT = "SELECT value, at FROM facts WHERE name = 'worker_heartbeat'"  # written by the worker every few seconds
_WINDOWS = "SELECT value FROM facts WHERE name = 'training_windows'"  # agent -> {"open", "reason"}, by the worker
_PROBLEMS = (
    "SELECT agent, number, problem FROM adapters WHERE problem IS NOT NULL "
    "AND state IN ('candidate', 'serving') ORDER BY agent, number"
)
_COUNTERS = "SELECT name, label, value FROM counters ORDER BY name, label"


@dataclass(frozen=True)
class StoredAgent:
    """One agent as the store knows it; counts are of its traces."""

    name: str
    mode: str | None  # None: the configured global mode
    version: int  # that serves it; 0: the base model
    candidates: int
    traces: int
    unscored: int  # wait for their reward
    without_reward: int  # scored, but no plugin had an opinion
    unforwarded: int  # scored, wait to go to the trainer
    forwarded: int  # at the trainer, not trained on yet
    trained: int
    skipped: int
    newest: int  # how many of the newest traces the next two speak of
    trainable: int
    reasons: tuple[tuple[str, int], ...] = ()  # why not, the most frequent first
    shut: str | None = None  # mode auto: why it may not train now


@dataclass(frozen=True)
class StoreView:
    """The whole store at a glance."""

    agents: tuple[StoredAgent, ...] = ()
    counters: tuple[tuple[str, str, int], ...] = ()  # name, label, value
    worker: tuple[str, float] | None = None  # who was last at work (host:pid:start), and when since the epoch
    empty: bool = False  # there is no store yet
    problems: tuple[str, ...] = ()  # of adapter versions that cannot be loaded or judged


@dataclass
class _Tally:
    forward: Counter[str] = field(default_factory=Counter)
    score: Counter[str] = field(default_factory=Counter)
    scored_waiting: int = 0


def read_store(url: str) -> StoreView:
    """Read the store at ``url``; an SQLite file that is not there yet is an empty store.

    Raises:
        StoreError: if it cannot be opened or read.
    """
    return query_store(url, _view) or StoreView(empty=True)


def query_store(url: str, read: Callable[[Query], T]) -> T | None:
    """What ``read`` makes of the store, in one read-only connection; ``None`` if there is no SQLite file yet.

    Raises:
        StoreError: if it cannot be opened or read.
    """
    if not url.startswith(SQLITE):
        return _query_other(url, read)
    path = Path(url.removeprefix(SQLITE))
    return _query_sqlite(path, read) if path.exists() else None


def _query_sqlite(path: Path, read: Callable[[Query], T]) -> T:
    try:
        connection = sqlite3.connect(f"file:{quote(str(path))}?mode=ro", uri=True, timeout=0.3)
        try:
            return read(lambda sql, **values: connection.execute(sql, values).fetchall())
        finally:
            connection.close()
    except sqlite3.Error as error:
        raise StoreError(f"cannot read the store {path}: {error}") from error


def _query_other(url: str, read: Callable[[Query], T]) -> T:
    import sqlalchemy as sa

    try:
        parsed = sa.make_url(url)
        if parsed.drivername in {"postgresql", "postgres"}:
            parsed = parsed.set(drivername="postgresql+psycopg")
        engine = sa.create_engine(parsed)
        try:
            with engine.connect() as c:
                return read(lambda sql, **values: c.execute(sa.text(sql), values).fetchall())
        finally:
            engine.dispose()
    except (sa.exc.SQLAlchemyError, ImportError) as error:
        shown = sa.make_url(url).render_as_string(hide_password=True)
        raise StoreError(f"cannot read the store {shown}: {str(error).splitlines()[0]}") from error


def _view(query: Query) -> StoreView:
    serving = {agent: int(version) for agent, version in query(_SERVING)}
    candidates = {agent: int(count) for agent, count in query(_CANDIDATES)}
    tallies: dict[str, _Tally] = defaultdict(_Tally)
    for agent, forward, score, count in query(_COUNTS):
        tally = tallies[agent]
        tally.forward[forward] += count
        tally.score[score] += count
        if score == "scored" and forward in ("waiting", "merged"):
            tally.scored_waiting += count
    agents = []
    windows: dict[str, Any] = next((_told(value) for (value,) in query(_WINDOWS)), {})
    everyone = next((_told(value)["mode"] for (value,) in query(_GLOBAL_MODE)), None)
    for name, mode in query(_AGENTS):
        tally = tallies[name]
        verdicts = query(_VERDICTS, agent=name)
        reasons = Counter(
            {str(reason or "no reason given"): int(n) for trainable, reason, n in verdicts if not trainable}
        )
        agents.append(
            StoredAgent(
                name=name,
                mode=mode or everyone,
                version=serving.get(name, 0),
                candidates=candidates.get(name, 0),
                traces=tally.forward.total(),
                unscored=tally.score["waiting"],
                without_reward=tally.score["unscored"],
                unforwarded=tally.scored_waiting,
                forwarded=tally.forward["forwarded"],
                trained=tally.forward["trained"],
                skipped=tally.forward["skipped"],
                newest=sum(int(n) for _, _, n in verdicts),
                trainable=sum(int(n) for trainable, _, n in verdicts if trainable),
                reasons=tuple(reasons.most_common(3)),
                shut=None if windows.get(name, {}).get("open", True) else str(windows[name].get("reason")),
            )
        )
    counters = tuple((name, label, int(value)) for name, label, value in query(_COUNTERS))
    heartbeat = query(_HEARTBEAT)
    worker = None
    for value, at in heartbeat:
        told = _told(value)
        worker = (str(told.get("owner", "")), float(at))
    problems = tuple(f"{agent}@v{number}: {problem}" for agent, number, problem in query(_PROBLEMS))
    return StoreView(tuple(agents), counters, worker, problems=problems)


def _told(value: Any) -> Any:
    """A JSON column's value: SQLite keeps it as text."""
    return json.loads(value) if isinstance(value, str) else value
