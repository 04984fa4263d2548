"""What is kept for each agent: whether it may train, where its head stands, and why nothing is training."""

from __future__ import annotations

import time
from typing import Any

import sqlalchemy as sa
from metaclaw_hooks.wire import AgentStatus, AgentTraining

from metaclaw_trainer.errors import UnknownAgentError
from metaclaw_trainer.schema import agents, samples
from metaclaw_trainer.store import Store, insert_missing


def ensure_agent(c: sa.Connection, name: str) -> None:
    """Make the row of an agent that has none."""
    if c.scalar(sa.select(agents.c.name).where(agents.c.name == name)) is not None:
        return
    values = {
        "name": name, "allowed": False, "train_now": False, "head": 0, "head_generation": 0, "newest": 0,
        "metrics": {}, "failures": 0,
    }  # fmt: skip
    insert_missing(c, agents, values)


def raise_generation(c: sa.Connection, name: str) -> None:
    """A step of this agent that has begun will not be committed."""
    c.execute(agents.update().where(agents.c.name == name).values(head_generation=agents.c.head_generation + 1))


def may_train(now: float) -> sa.ColumnElement[bool]:
    """Whether an agent's row allows a step at ``now`` (Unix seconds): the worker said so, and that still holds.

    What was allowed after ``now`` was so by a clock that was set back since: nothing tells how long ago that is.
    """
    holds = sa.and_(agents.c.allowed_from <= now, agents.c.allowed_until > now)
    return sa.and_(agents.c.allowed, sa.or_(agents.c.allowed_until.is_(None), holds))


class AgentBook:
    """Settings and status of agents over the store."""

    def __init__(self, store: Store, batch_size: int) -> None:
        self._store = store
        self._batch_size = batch_size

    def set_training(self, name: str, wanted: AgentTraining) -> AgentStatus:
        """Set what is not ``None``; the agent is made if there is none of that name."""
        values = wanted.model_dump(exclude_none=True, exclude={"allowed_for"})
        if wanted.allowed is not None:
            now = time.time()
            until = None if wanted.allowed_for is None else now + wanted.allowed_for
            values |= {"allowed_from": now, "allowed_until": until}
        with self._store.write() as c:
            ensure_agent(c, name)
            if values:
                c.execute(agents.update().where(agents.c.name == name).values(**values))
        return self.status(name)

    def train_now(self, name: str) -> str | None:
        """Take a step with what is queued, allowed or not; else one line saying why there is nothing to train.

        Raises:
            UnknownAgentError: if the agent never sent anything.
        """
        status = self.status(name)
        if status.training:
            return f"a step of {name} is running"
        if not status.queued:
            return f"no sample of {name} is waiting"
        with self._store.write() as c:
            c.execute(agents.update().where(agents.c.name == name).values(train_now=True))
        return None

    def status(self, name: str) -> AgentStatus:
        """Where one agent stands.

        Raises:
            UnknownAgentError: if there is none of that name.
        """
        found = self.statuses(name)
        if not found:
            raise UnknownAgentError(f"no agent {name!r} here: it has sent no sample yet; see GET /v1/agents")
        return found[0]

    def statuses(self, name: str | None = None) -> list[AgentStatus]:
        """Where all agents stand (or one), by name."""
        now = time.time()
        query = sa.select(agents, may_train(now).label("may_train")).order_by(agents.c.name)
        counts = sa.select(samples.c.agent, samples.c.state, sa.func.count().label("n")).group_by(
            samples.c.agent, samples.c.state
        )
        if name is not None:
            query, counts = query.where(agents.c.name == name), counts.where(samples.c.agent == name)
        with self._store.read() as c:
            rows = c.execute(query).all()
            by_state = {(row.agent, row.state): row.n for row in c.execute(counts)}
            reasons = {row.name: self._top_reason(c, row.name) for row in rows if by_state.get((row.name, "set_aside"))}
        return [self._status(row, by_state, reasons.get(row.name), now) for row in rows]

    def _top_reason(self, c: sa.Connection, name: str) -> str | None:
        query = sa.select(samples.c.reason).where(samples.c.agent == name, samples.c.state == "set_aside")
        return c.scalar(query.order_by(samples.c.settled_at.desc()).limit(1))

    def _status(
        self, row: sa.Row[Any], by_state: dict[tuple[str, str], int], reason: str | None, now: float
    ) -> AgentStatus:
        def count(state: str) -> int:
            return by_state.get((row.name, state), 0)

        size = row.batch_size or self._batch_size
        return AgentStatus(
            agent=row.name,
            allowed=row.may_train,
            allowed_for=row.allowed_until - now if row.may_train and row.allowed_until is not None else None,
            queued=count("waiting"),
            batch_size=size,
            set_aside=count("set_aside"),
            trained=count("trained"),
            step=int(row.metrics.get("step", 0)),
            head=row.head,
            newest=row.newest,
            training=row.owner is not None,
            idle_reason=idle_reason(row, count("waiting"), size, count("set_aside"), reason),
            metrics={key: value for key, value in row.metrics.items() if key != "step"},
        )


def idle_reason(row: sa.Row[Any], waiting: int, size: int, set_aside: int, reason: str | None) -> str | None:
    """One line: why nothing of this agent is training; ``None`` while something is, or is about to be."""
    if row.owner is not None:
        return None
    if row.last_error and row.retry_at is not None and row.retry_at > time.time():
        seconds = max(1, round(row.retry_at - time.time()))
        return f"the last step failed: {row.last_error}; next try in {seconds} s"
    if row.train_now:
        return None
    aside = f"; {set_aside} set aside, the last because: {reason}" if set_aside and reason else ""
    if waiting < size:
        return f"{waiting} of {size} samples are waiting{aside}"
    if not row.allowed:
        return f"{waiting} samples are waiting, but the worker does not allow training now (mode or window){aside}"
    if not row.may_train:
        return (
            f"{waiting} samples are waiting, but what the worker allowed has run out and it did not say so again: "
            f"does it run, and reach this trainer?{aside}"
        )
    return None
