"""New skills from failures: reserve, ask, judge, apply. One agent at a time, away from any request.

    scored failure ─► support (settled, never trained) ─► evolver ─► edits, judged ─► files + generation, or .proposed/

Whatever goes wrong, the library stays as it was and the round is kept with its reason.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Sequence
from dataclasses import replace

import httpx
import sqlalchemy as sa
from metaclaw_hooks.types import Agent
from sqlalchemy.engine import Connection, Engine

from metaclaw_plugin.errors import SkillError
from metaclaw_plugin.settings import Settings
from metaclaw_plugin.skills.editing import Proposal, SkillFolder
from metaclaw_plugin.skills.edits import Change, Limits, Refused, judge_edits, parse_answer
from metaclaw_plugin.skills.evolver_client import ask_evolver
from metaclaw_plugin.skills.evolver_prompt import PROMPT_VERSION, Failure, Material, build_prompt
from metaclaw_plugin.skills.ledger import read_ledger
from metaclaw_plugin.skills.library import Library
from metaclaw_plugin.skills.query import clean
from metaclaw_plugin.skills.retrieval import Retriever
from metaclaw_plugin.skills.skill_file import Skill
from metaclaw_plugin.skills.support import RoundRecord, finish_round, pending
from metaclaw_plugin.store.agents import raise_generation
from metaclaw_plugin.store.counters import count
from metaclaw_plugin.store.schema import traces
from metaclaw_plugin.store.traces import TraceFilter, get_trace, iter_stored

log = logging.getLogger(__name__)

_NEAREST = 8  # skills that the evolver is shown
_EACH = 4  # of them, for one failure


class Evolution:
    """Evolves agents' skills in one library. Makes no decision about when; see ``support.is_due``."""

    def __init__(self, settings: Settings, engine: Engine, http: httpx.AsyncClient, library: Library) -> None:
        self._settings = settings
        self._engine = engine
        self._http = http
        self._library = library
        words_alone = settings.skills.model_copy(update={"retrieval": "lexical"})
        self._retriever = Retriever(library, words_alone)

    async def evolve(self, agent: Agent) -> RoundRecord | None:
        """Show the evolver what is reserved for it and carry out its answer; ``None``: nothing is reserved.

        A round that fails is returned, and kept, like any other.
        """
        model = self._settings.skills.evolution.model or ""
        started = time.time()
        material = await asyncio.to_thread(self._material, agent)
        if not material.failures:
            return None
        shown = [failure.trace.id for failure in material.failures]
        record = RoundRecord(
            id=f"ev-{secrets.token_hex(8)}",
            agent=agent.name,
            state="failed",
            model=model,
            prompt_version=PROMPT_VERSION,
            trace_ids=shown,
            detail={},
            generation=agent.skill_generation,
            seconds=0.0,
            at=started,
        )
        try:
            answer = await ask_evolver(self._http, self._settings, build_prompt(material, self._limits))
            record = await asyncio.to_thread(self._carry_out, record, answer)
        except SkillError as error:
            record = replace(record, detail={"error": _storable(str(error))}, seconds=time.time() - started)
            log.warning("evolving skills of %s failed, the library stays as it was: %s", agent.name, error)
            await asyncio.to_thread(self._keep, record)
        return record

    @property
    def _limits(self) -> Limits:
        evolution = self._settings.skills.evolution
        return Limits(evolution.max_edits, evolution.max_own_skills, evolution.max_body)

    def _material(self, agent: Agent) -> Material:
        with self._engine.connect() as c:
            ids = pending(c, agent.name)[: self._settings.skills.evolution.max_traces]
            failures = [failure for trace in ids for failure in _failure(c, trace)]
            ledger = read_ledger(c, agent.name)
        self._library.refresh()
        found: dict[str, tuple[float, Skill]] = {}
        for failure in failures:
            for item in self._retriever.search(agent.name, clean(failure.trace.last_user_text), _EACH):
                best = max(item.relevance, found.get(item.skill.name, (0.0, item.skill))[0])
                found[item.skill.name] = (best, item.skill)
        in_force = {ref.name for failure in failures for ref in failure.trace.skills}
        skills = self._library.view(agent.name).skills
        found |= {name: (9.0, skills[name]) for name in in_force if name in skills}  # these were tried, and failed
        nearest = [skill for _, skill in sorted(found.values(), key=lambda pair: -pair[0])][:_NEAREST]
        return Material(failures, nearest, {name: entry.summary for name, entry in ledger.items()})

    def _carry_out(self, record: RoundRecord, answer: str) -> RoundRecord:
        provenance = {
            "origin": "evolved",
            "round": record.id,
            "model": record.model,
            "prompt_version": record.prompt_version,
            "traces": " ".join(record.trace_ids),
        }
        self._library.refresh()
        view = self._library.view(record.agent)
        changes, refused = judge_edits(parse_answer(answer), view, self._limits, provenance)
        for item in refused:
            log.info("an edit of %s's skill %s is refused: %s", record.agent, item.name, item.reason)
        record = replace(record, detail=_detail(changes, refused), seconds=time.time() - record.at)
        folder = SkillFolder(self._library.root, record.agent)
        if not changes:
            return self._keep(replace(record, state="nothing"))
        if self._settings.skills.evolution.approval == "review":
            for change in changes:
                folder.propose(change, record.id)
            return self._keep(replace(record, state="proposed"))
        record = apply_changes(self._engine, folder, changes, replace(record, state="applied"))
        self._library.refresh()
        return record

    def _keep(self, record: RoundRecord) -> RoundRecord:
        with self._engine.begin() as c:
            _count_round(c, record)
            finish_round(c, record)
        return record


def apply_changes(engine: Engine, folder: SkillFolder, changes: Sequence[Change], record: RoundRecord) -> RoundRecord:
    """Write ``changes``, raise the agent's generation and keep the round: all of it, or nothing.

    Raises:
        SkillError: if the disk refuses.
        UnknownAgentError: if the agent is gone.
    """
    with folder.applied(changes), engine.begin() as c:
        record = replace(record, generation=raise_generation(c, record.agent))
        _count_round(c, record)
        finish_round(c, record)
    for change in changes:
        log.info("skill %s of %s: %s (generation %d)", change.name, record.agent, change.action, record.generation)
    return record


def accept_proposal(engine: Engine, folder: SkillFolder, proposal: Proposal) -> int:
    """Carry out a proposal; returns the agent's new skill generation.

    Raises:
        SkillError: if it can no longer be carried out.
        UnknownAgentError: if the agent is gone.
    """
    with folder.applied([proposal.change]), engine.begin() as c:
        generation = raise_generation(c, proposal.agent)
        count(c, "skill_edits_accepted", proposal.agent)
    folder.drop_proposal(proposal)
    return generation


def _failure(c: Connection, trace_id: str) -> list[Failure]:
    t = traces.c
    found = []
    for stored in iter_stored(c, TraceFilter(id=trace_id)):
        trace = stored.trace
        later = sa.select(t.id).where(t.session == trace.session, t.kind == "main", t.exchange > trace.exchange)
        answer = c.execute(later.order_by(t.turn).limit(1)).scalar_one_or_none()
        reply = clean(get_trace(c, answer).last_user_text) if answer is not None else None
        found.append(Failure(trace, stored.reward or 0.0, stored.rewards, stored.hint, reply))
    return found


def _detail(changes: Sequence[Change], refused: Sequence[Refused]) -> dict[str, list[dict[str, object]]]:
    return {
        "accepted": [
            {
                "action": change.action,
                "name": change.name,
                "retires": list(change.retires),
                "reason": _storable(change.reason),
            }
            for change in changes
        ],
        "refused": [{"name": _storable(item.name), "reason": _storable(item.reason)} for item in refused],
    }


def _storable(text: str) -> str:
    """Without what a model may write and a database may refuse."""
    return text.replace("\x00", "").encode("utf-8", "replace").decode()[:1000]


def _count_round(c: Connection, record: RoundRecord) -> None:
    count(c, f"skill_rounds_{record.state}", record.agent)
    for what in ("accepted", "refused"):
        if number := len(record.detail.get(what, ())):
            count(c, f"skill_edits_{what}", record.agent, number)
