"""The list of adapter versions: what was trained, from what, into which folder; and which of them vLLM shall hold.

``StoredVersions`` is the port ``VersionStore``. Listing a version and spending its samples is one transaction, so a
process that is killed has done both or neither.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import sqlalchemy as sa
from metaclaw_hooks.errors import InvalidNameError
from metaclaw_hooks.names import parse_version
from metaclaw_hooks.types import AdapterVersion
from metaclaw_hooks.wire import VersionBody

from metaclaw_trainer.agents import ensure_agent, raise_generation
from metaclaw_trainer.errors import ConflictError, UnknownVersionError
from metaclaw_trainer.ports import Head
from metaclaw_trainer.proof import Proof, save_proof
from metaclaw_trainer.sample_queue import MAX_INT, SPENT, free_if_done
from metaclaw_trainer.schema import agents, counters, kept, samples, served, versions
from metaclaw_trainer.store import Store, insert_missing


@dataclass(frozen=True, slots=True)
class Wanted:
    """A version that vLLM shall hold."""

    name: str  # agent@vN
    path: str


class StoredVersions:
    """See the module. ``owner`` is this process as holder of claims."""

    def __init__(self, store: Store, owner: str) -> None:
        self._store = store
        self._owner = owner

    def head(self, agent: str) -> Head:
        """Where the agent's training stands; ``Head(0, 0)`` for one that never trained."""
        with self._store.read() as c:
            row = c.execute(sa.select(agents).where(agents.c.name == agent)).first()
        return Head(row.head, row.newest, row.head_generation) if row else Head(0, 0)

    def commit(
        self, version: AdapterVersion, sample_ids: Sequence[str], generation: int, proof: Proof | None = None
    ) -> bool:
        """In one transaction: list the version, make it the head, mark its samples trained.

        False, and nothing is changed, if the head was put back or a sample was recalled meanwhile, or if this process
        no longer holds the samples. True for a version that is listed already, with the same weights.
        """
        with self._store.write() as c:
            ensure_agent(c, version.agent)
            query = sa.select(agents.c.head_generation).where(agents.c.name == version.agent)
            current = c.scalar(query.with_for_update())
            mine = sa.and_(versions.c.agent == version.agent, versions.c.number == version.number)
            listed = c.scalar(sa.select(versions.c.manifest).where(mine))
            if listed is not None:
                return bool(listed["sha256"] == version.sha256)
            held = sa.and_(
                samples.c.id.in_(list(sample_ids)), samples.c.state == "claimed", samples.c.owner == self._owner
            )
            count = c.scalar(sa.select(sa.func.count()).where(held))
            if current != generation or count != len(set(sample_ids)):
                return False
            now = time.time()
            c.execute(
                samples.update()
                .where(held)
                .values(state="trained", owner=None, version=version.number, settled_at=now, **SPENT)
            )
            c.execute(
                versions.insert().values(
                    cursor=_next_cursor(c),
                    agent=version.agent,
                    number=version.number,
                    manifest=_manifest(version),
                    path=version.path,
                    size=folder_size(Path(version.path)),
                    created_at=version.created_at,
                )
            )
            if proof is not None:
                save_proof(c, version.agent, version.number, proof)
            c.execute(
                agents.update()
                .where(agents.c.name == version.agent)
                .values(
                    head=version.number,
                    newest=sa.case((agents.c.newest > version.number, agents.c.newest), else_=version.number),
                    metrics={**version.metrics, "step": version.step},
                    last_error=None,
                    retry_at=None,
                    failures=0,
                )
            )
            free_if_done(c, version.agent, self._owner)
        return True

    def skipped(self, agent: str, sample_ids: Sequence[str], reason: str) -> None:
        """A batch without signal: its samples are spent without a version, ``reason`` is shown."""
        with self._store.write() as c:
            c.execute(
                samples.update()
                .where(samples.c.id.in_(list(sample_ids)), samples.c.state == "claimed", samples.c.owner == self._owner)
                .values(state="set_aside", owner=None, reason=reason[:400], settled_at=time.time(), **SPENT)
            )
            c.execute(agents.update().where(agents.c.name == agent).values(last_error=None, retry_at=None, failures=0))
            free_if_done(c, agent, self._owner)

    def after(self, cursor: int, limit: int = 200) -> list[VersionBody]:
        """Versions listed after ``cursor``, ascending."""
        query = sa.select(versions).where(versions.c.cursor > cursor).order_by(versions.c.cursor).limit(limit)
        with self._store.read() as c:
            return [VersionBody(**row.manifest, cursor=row.cursor) for row in c.execute(query)]

    def put_head(self, agent: str, number: int) -> Head:
        """The next step starts from version ``number`` (0: the base model); a running step is not committed.

        Raises:
            UnknownVersionError: if the agent has no such version.
            ConflictError: if its files were removed to save space.
        """
        with self._store.write() as c:
            if number:
                query = sa.select(versions.c.removed_at).where(versions.c.agent == agent, versions.c.number == number)
                found = c.execute(query.with_for_update()).first() if number <= MAX_INT else None
                if found is None:
                    raise UnknownVersionError(f"{agent} has no version {number}; see GET /v1/versions")
                if found.removed_at is not None:
                    raise ConflictError(
                        f"the files of {agent}@v{number} were removed to save space; choose a newer one"
                    )
            ensure_agent(c, agent)
            raise_generation(c, agent)
            c.execute(agents.update().where(agents.c.name == agent).values(head=number, last_error=None, retry_at=None))
        return self.head(agent)

    def set_served(self, names: Sequence[str], keep: Sequence[str] = ()) -> dict[str, str]:
        """Make the known ones of ``names`` the whole set that vLLM shall hold; name -> reason for the others.

        The known ones of ``keep`` are the whole set whose files stay besides, whatever the disk budget.
        """
        with self._store.write() as c:
            # One order for all who lock these rows, so that no two wait for each other.
            reasons = {name: self._cannot_serve(c, name) for name in sorted({*names, *keep})}
            for table, chosen in ((served, names), (kept, keep)):
                c.execute(table.delete())
                rows = [{"name": name} for name in dict.fromkeys(chosen) if reasons[name] is None]
                if rows:
                    c.execute(table.insert(), rows)
        return {name: reason for name in names if (reason := reasons[name]) is not None}

    def _cannot_serve(self, c: sa.Connection, name: str) -> str | None:
        try:
            agent, number = parse_version(name)
        except InvalidNameError as error:
            return str(error)
        query = sa.select(versions.c.removed_at).where(versions.c.agent == agent, versions.c.number == number)
        found = c.execute(query.with_for_update()).first()
        if found is None:
            return "this trainer never made it"
        return "its files were removed to save space" if found.removed_at is not None else None

    def served(self) -> list[Wanted]:
        """The set that vLLM shall hold, by name."""
        with self._store.read() as c:
            names = sorted(c.scalars(sa.select(served.c.name)))
            return [Wanted(name, self._path(c, name)) for name in names]

    def path_of(self, name: str) -> str | None:
        """The folder of ``agent@vN``; None: this trainer never made it, or its files were removed."""
        with self._store.read() as c:
            return None if self._cannot_serve(c, name) else self._path(c, name)

    def _path(self, c: sa.Connection, name: str) -> str:
        agent, number = parse_version(name)
        query = sa.select(versions.c.path).where(versions.c.agent == agent, versions.c.number == number)
        return str(c.scalar(query))


def _next_cursor(c: sa.Connection) -> int:
    """The next position in the list; whoever asks next waits until this transaction ends, so no reader skips one."""
    mine = sa.and_(counters.c.name == "versions", counters.c.label == "cursor")
    insert_missing(c, counters, {"name": "versions", "label": "cursor", "value": 0})
    c.execute(counters.update().where(mine).values(value=counters.c.value + 1))
    return int(c.scalar(sa.select(counters.c.value).where(mine)) or 0)


def _manifest(version: AdapterVersion) -> dict[str, object]:
    body = VersionBody(
        agent=version.agent,
        number=version.number,
        base_model=version.base_model,
        parent=version.parent,
        trace_ids=list(version.trace_ids),
        step=version.step,
        metrics=dict(version.metrics),
        sha256=version.sha256,
        libraries=dict(version.libraries),
        path=version.path,
        created_at=version.created_at,
    )
    return body.model_dump(exclude={"cursor"})


def folder_size(folder: Path) -> int:
    """Bytes of the files in ``folder``; 0 if it is not there."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
