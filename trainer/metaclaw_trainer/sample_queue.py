"""Durable samples: in by id exactly once, out in order of arrival, spent exactly once.

``StoredQueue`` is the port ``SampleQueue`` over the store. A sample is waiting, claimed by one process, and then
trained (by ``StoredVersions.commit`` alone), set aside, or recalled by its owner.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import sqlalchemy as sa
from metaclaw_hooks.types import Sample

from metaclaw_trainer.agents import ensure_agent, may_train, raise_generation
from metaclaw_trainer.codec import decode_sample, encode_sample
from metaclaw_trainer.lineage import learned_from, with_descendants
from metaclaw_trainer.schema import agents, proofs, recalled_traces, sample_traces, samples
from metaclaw_trainer.store import Store

SPENT: dict[str, object] = {"token_ids": None, "logprobs": None, "hint": None}  # what is not kept once it is settled
MAX_INT = 2**31 - 1  # of an Integer column
MAX_ID = 200  # characters of a trace id
RETRY_SECONDS = (5.0, 30.0, 120.0, 600.0)  # after the first, second ... failure in a row


@dataclass(frozen=True, slots=True)
class Limits:
    """What a sample must keep to, to be queued."""

    vocabulary: int  # token ids are below
    max_tokens: int
    max_queued: int  # waiting samples of one agent
    batch_size: int  # of agents that have none of their own


@dataclass(slots=True)
class PutResult:
    """Every sample given is in exactly one of the lists."""

    accepted: list[str] = field(default_factory=list)
    duplicate: list[str] = field(default_factory=list)
    refused: list[tuple[str, str]] = field(default_factory=list)  # id, reason: final
    full: list[tuple[str, str]] = field(default_factory=list)  # id, agent: no room now, send again


class StoredQueue:
    """See the module. ``owner`` is this process as holder of claims."""

    def __init__(self, store: Store, owner: str, limits: Limits) -> None:
        self._store = store
        self._owner = owner
        self.limits = limits

    def put(self, given: Sequence[Sample], vetoes: Iterable[str] = ()) -> PutResult:
        """Queue samples; durable when this returns. ``vetoes``: ids that a plugin sets aside."""
        result, vetoed = PutResult(), set(vetoes)
        with self._store.write() as c:
            room: dict[str, int] = {}
            recalled = _which(c, recalled_traces.c.trace_id, {t.trace_id for s in given for t in s.turns})
            known = _which(c, samples.c.id, {s.id for s in given})
            for sample in given:
                if sample.id in known:
                    result.duplicate.append(sample.id)
                    continue
                reason = self._refusal(c, sample, recalled)
                if reason:
                    result.refused.append((sample.id, reason))
                    continue
                if sample.agent not in room:
                    ensure_agent(c, sample.agent)
                    room[sample.agent] = self.limits.max_queued - _count(c, sample.agent, "waiting")
                if room[sample.agent] <= 0:
                    result.full.append((sample.id, sample.agent))
                    continue
                self._insert(c, sample, "accept_sample: a plugin set it aside" if sample.id in vetoed else None)
                room[sample.agent] -= sample.id not in vetoed
                known.add(sample.id)
                result.accepted.append(sample.id)
        return result

    def _refusal(self, c: sa.Connection, sample: Sample, recalled: set[str]) -> str | None:
        if len(sample.token_ids) > self.limits.max_tokens:
            return f"{len(sample.token_ids)} tokens; setting max_sample_tokens allows {self.limits.max_tokens}"
        if sample.skill_generation > MAX_INT or any("\x00" in text for text in _texts(sample)):
            return "a number or a text in it is one that no database keeps"
        outside = max(sample.token_ids)
        if outside >= self.limits.vocabulary:
            return f"token id {outside} is outside the vocabulary of {self.limits.vocabulary}: another base model?"
        gone = sorted({turn.trace_id for turn in sample.turns} & recalled)
        if gone:
            return f"trace {gone[0]} was deleted by its owner"
        if sample.adapter_version:
            newest = c.scalar(sa.select(agents.c.newest).where(agents.c.name == sample.agent)) or 0
            if sample.adapter_version > newest:
                return f"drawn by version {sample.adapter_version} of {sample.agent}; this trainer made {newest}"
        return None

    def _insert(self, c: sa.Connection, sample: Sample, reason: str | None) -> None:
        state = "set_aside" if reason else "waiting"
        now = time.time()
        c.execute(
            samples.insert().values(
                **encode_sample(sample),
                state=state,
                reason=reason,
                received_at=now,
                settled_at=now if reason else None,
            )
        )
        traces = sorted({turn.trace_id for turn in sample.turns})
        c.execute(sample_traces.insert(), [{"trace_id": t, "sample_id": sample.id} for t in traces])

    def recall(self, trace_ids: Sequence[str]) -> tuple[list[str], list[str]]:
        """Forget traces: ids of samples taken out, and names of versions that learned from them already.

        A batch that holds one of them and is being trained is not committed; its other samples wait again.
        """
        now = time.time()
        with self._store.write() as c:
            wanted = {name for name in trace_ids if len(name) <= MAX_ID and "\x00" not in name}
            new = wanted - _which(c, recalled_traces.c.trace_id, wanted)
            if new:
                c.execute(recalled_traces.insert(), [{"trace_id": t, "at": now} for t in sorted(new)])
            ids: set[str] = set()
            for part in _parts(sorted(wanted)):
                ids |= set(c.scalars(sa.select(sample_traces.c.sample_id).where(sample_traces.c.trace_id.in_(part))))
            # Rows of samples that were trained long ago are gone; the versions' manifests still name their traces.
            trained = learned_from(c, wanted - _which(c, sample_traces.c.trace_id, wanted))
            for agent, number in trained:
                c.execute(proofs.delete().where(proofs.c.agent == agent, proofs.c.number == number))
            removed: list[str] = []
            for part in _parts(sorted(ids)):
                query = sa.select(samples.c.id, samples.c.agent, samples.c.state, samples.c.version)
                for row in c.execute(query.where(samples.c.id.in_(part))).all():
                    if row.state == "trained" and row.version is not None:
                        trained.add((row.agent, row.version))
                    elif row.state != "recalled":
                        removed.append(row.id)
                    if row.state == "claimed":
                        raise_generation(c, row.agent)
                c.execute(
                    samples.update()
                    .where(samples.c.id.in_(part))
                    .values(
                        state=sa.case((samples.c.state == "trained", "trained"), else_="recalled"),
                        owner=None,
                        settled_at=now,
                        **SPENT,
                    )
                )
            for part in _parts(sorted(ids)):
                c.execute(proofs.delete().where(proofs.c.sample_id.in_(part)))
            names = sorted(f"{agent}@v{number}" for agent, number in with_descendants(c, trained))
        return removed, names

    def set_rewards(self, rewards: Mapping[str, float]) -> tuple[list[str], list[str]]:
        """Change rewards, by trace id; ids of traces that will be trained so, and of those in a running step."""
        changed: set[str] = set()
        claimed: set[str] = set()
        with self._store.write() as c:
            of = sample_traces.c
            for part in _parts(sorted(name for name in rewards if "\x00" not in name)):
                mine = sa.select(of.sample_id).where(of.trace_id.in_(part))
                query = sa.select(samples.c.id, samples.c.state, samples.c.turns).where(samples.c.id.in_(mine))
                for row in c.execute(query.where(samples.c.state.in_(("waiting", "claimed")))).all():
                    told = {trace for trace, *_ in row.turns} & set(part)
                    if row.state == "claimed":
                        claimed |= told
                        continue
                    turns = [[trace, *span, rewards.get(trace, reward)] for trace, *span, reward in row.turns]
                    c.execute(samples.update().where(samples.c.id == row.id).values(turns=turns))
                    changed |= told
        return sorted(changed), sorted(claimed)

    def ready(self) -> list[tuple[str, int]]:
        """Agents that may train now and have enough samples, with how many to claim; longest waiting first.

        Asked only when this process trains nothing.
        """
        waiting = (
            sa.select(samples.c.agent, sa.func.count().label("n"), sa.func.min(samples.c.seq).label("oldest"))
            .where(self._free())
            .group_by(samples.c.agent)
            .subquery()
        )
        size = sa.func.coalesce(agents.c.batch_size, self.limits.batch_size)
        now = time.time()
        # Later than the longest pause allows, it was set by a clock that was set back since.
        paused = agents.c.retry_at.between(now, now + RETRY_SECONDS[-1])
        query = (
            sa.select(agents.c.name, waiting.c.n, size.label("size"), agents.c.train_now)
            .join(waiting, waiting.c.agent == agents.c.name)
            .where(
                sa.or_(agents.c.owner.is_(None), agents.c.owner == self._owner),
                sa.or_(sa.and_(may_train(now), waiting.c.n >= size), agents.c.train_now),
                sa.or_(agents.c.retry_at.is_(None), ~paused, agents.c.train_now),
            )
            .order_by(waiting.c.oldest)
        )
        with self._store.read() as c:
            return [(row.name, min(row.n, row.size)) for row in c.execute(query)]

    def _free(self) -> sa.ColumnElement[bool]:
        """Waiting, or left claimed by this process (which trains one batch at a time) that could not give it back."""
        left = sa.and_(samples.c.state == "claimed", samples.c.owner == self._owner)
        return sa.or_(samples.c.state == "waiting", left)

    def claim(self, agent: str, n: int) -> list[Sample]:
        """Up to ``n`` waiting samples in order of arrival; empty if another process trains the agent."""
        with self._store.write() as c:
            taken = c.execute(
                agents.update()
                .where(agents.c.name == agent, sa.or_(agents.c.owner.is_(None), agents.c.owner == self._owner))
                .values(owner=self._owner, train_now=False)
            )
            if taken.rowcount == 0:
                return []
            rows = c.execute(
                sa.select(samples).where(samples.c.agent == agent, self._free()).order_by(samples.c.seq).limit(n)
            ).all()
            if not rows:
                c.execute(agents.update().where(agents.c.name == agent).values(owner=None))
                return []
            c.execute(
                samples.update()
                .where(samples.c.id.in_([row.id for row in rows]))
                .values(state="claimed", owner=self._owner)
            )
        return [decode_sample(row) for row in rows]

    def set_aside(self, ids: Sequence[str], reason: str) -> None:
        """These will never be trained; the agent is free when nothing of it is claimed any more."""
        self._settle(ids, {"state": "set_aside", "reason": reason[:400], "settled_at": time.time(), **SPENT})

    def release(self, ids: Sequence[str], reason: str | None = None) -> None:
        """These wait again; ``reason``: why the step failed, shown, and retried with growing pauses."""
        self._settle(ids, {"state": "waiting"}, failure=reason)

    def _settle(self, ids: Sequence[str], values: dict[str, object], failure: str | None = None) -> None:
        if not ids:
            return
        held = sa.and_(samples.c.id.in_(list(ids)), samples.c.state == "claimed", samples.c.owner == self._owner)
        with self._store.write() as c:
            names = set(c.scalars(sa.select(samples.c.agent).where(samples.c.id.in_(list(ids))).distinct()))
            c.execute(samples.update().where(held).values(owner=None, **values))
            for name in sorted(names):
                if failure:
                    _note_failure(c, name, failure)
                free_if_done(c, name, self._owner)


def free_if_done(c: sa.Connection, agent: str, owner: str) -> None:
    """Another process may train ``agent`` once ``owner`` holds no sample of it."""
    held = sa.exists().where(samples.c.agent == agent, samples.c.state == "claimed", samples.c.owner == owner)
    c.execute(agents.update().where(agents.c.name == agent, agents.c.owner == owner, ~held).values(owner=None))


def _note_failure(c: sa.Connection, agent: str, reason: str) -> None:
    failures = (c.scalar(sa.select(agents.c.failures).where(agents.c.name == agent)) or 0) + 1
    pause = RETRY_SECONDS[min(failures, len(RETRY_SECONDS)) - 1]
    c.execute(
        agents.update()
        .where(agents.c.name == agent)
        .values(failures=failures, last_error=reason[:400], retry_at=time.time() + pause)
    )


def _texts(sample: Sample) -> list[str]:
    return [sample.id, sample.session, sample.hint or "", *(turn.trace_id for turn in sample.turns)]


def _count(c: sa.Connection, agent: str, state: str) -> int:
    query = sa.select(sa.func.count()).where(samples.c.agent == agent, samples.c.state == state)
    return c.scalar(query) or 0


def _parts(values: Sequence[str], size: int = 500) -> Iterable[Sequence[str]]:
    """A database takes only so many parameters in one statement."""
    return (values[start : start + size] for start in range(0, len(values), size))


def _which(c: sa.Connection, column: sa.Column[str], values: set[str]) -> set[str]:
    """Those of ``values`` that stand in ``column``."""
    found: set[str] = set()
    for part in _parts(sorted(values)):
        found |= set(c.scalars(sa.select(column).where(column.in_(part))))
    return found
