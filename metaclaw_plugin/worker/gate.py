"""The gate: who judges a candidate, and when the verdict is ready.

An evaluation takes a while, so each runs as a task of its own, one per agent, while publishing goes on for the others.
Whatever goes wrong in one is the problem of that candidate alone: it is shown with the version, and tried again later.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Collection
from typing import Protocol

import sqlalchemy as sa
from metaclaw_hooks.names import parse_version
from metaclaw_hooks.types import AdapterVersion

from metaclaw_plugin.errors import ConfigError, MetaclawError, UnknownAgentError
from metaclaw_plugin.settings import PublishSettings
from metaclaw_plugin.store.adapters import WISH_SERVE, VersionRecord
from metaclaw_plugin.store.agents import get_record
from metaclaw_plugin.worker.evaluation import EvaluationContext, Evaluator, evaluation_settings
from metaclaw_plugin.worker.verdicts import Decision, Evaluation, decide

logger = logging.getLogger(__name__)


class Judge(Protocol):
    """Measures a candidate."""

    async def evaluate(self, version: AdapterVersion, against: int, settings: PublishSettings) -> Evaluation: ...


class Gate:
    """Decides about candidates of all agents."""

    def __init__(self, ctx: EvaluationContext, judge: Judge | None = None) -> None:
        self._ctx = ctx
        self._judge = judge or Evaluator(ctx)
        self._tasks: dict[str, asyncio.Task[Decision]] = {}
        self._not_before: dict[str, float] = {}  # monotonic
        self.problems: dict[str, str] = {}  # version name -> why it cannot be judged for now

    @property
    def judging(self) -> frozenset[str]:
        """Names of the versions that are being evaluated."""
        return frozenset(self._tasks)

    async def decide(self, record: VersionRecord, against: int) -> Decision | None:
        """The verdict on a candidate that every vLLM holds; None: not ready yet, ask again in the next round."""
        version = record.version
        try:
            decision = await self._decide(record, against)
        except Exception as error:  # noqa: BLE001 - isolation boundary: one candidate's trial must not stop the others
            self._put_off(version.name, error)
            return None
        if decision is not None:
            self._forget(version.name)
        return decision

    async def _decide(self, record: VersionRecord, against: int) -> Decision | None:
        version = record.version
        if time.monotonic() < self._not_before.get(version.name, float("-inf")):
            return None
        if record.wish == WISH_SERVE:
            return Decision(True, f"v{version.number}: put in place by the owner", {"policy": "owner"})
        task = self._tasks.get(version.name)
        if task is None:
            if any(parse_version(name)[0] == version.agent for name in self._tasks):
                return None
            settings = await asyncio.to_thread(self._read_settings, version.agent)
            if settings.policy == "always":
                decision = Decision(True, f"v{version.number}: the policy is always, serving", {"policy": "always"})
                return await self._ask_plugins(version, decision)
            self._tasks[version.name] = asyncio.create_task(self._evaluate(version, against, settings))
            return None
        if not task.done():
            return None
        return self._tasks.pop(version.name).result()

    def _put_off(self, name: str, error: Exception) -> None:
        """Let a candidate that cannot be judged wait, and say so."""
        if isinstance(error, MetaclawError):
            reason = str(error)
            logger.warning("%s cannot be judged and goes on waiting: %s", name, reason)
        else:
            reason = f"{type(error).__name__}: {error}; the worker's log has all of it"
            logger.error("%s cannot be judged and goes on waiting", name, exc_info=error)
        pause = self._ctx.settings.publish.retry_interval
        cure = f"tried again every {pause:g} s; `metaclaw adapters promote {name}` lets it serve unjudged"
        self.problems[name] = f"cannot be judged: {reason} ({cure})"
        self._not_before[name] = time.monotonic() + pause

    def keep_only(self, names: Collection[str]) -> None:
        """Give up on evaluations of versions that are no candidates any more."""
        for name in [name for name in (self._tasks.keys() | self.problems.keys()) if name not in names]:
            self._forget(name)

    def close(self) -> None:
        """Give up on all evaluations; they begin anew with the next worker."""
        self.keep_only(())

    async def _evaluate(self, version: AdapterVersion, against: int, settings: PublishSettings) -> Decision:
        started = time.monotonic()
        decision = decide(version.number, await self._judge.evaluate(version, against, settings), settings)
        figures = {**decision.figures, "seconds": round(time.monotonic() - started, 3)}
        return await self._ask_plugins(version, Decision(decision.accepted, decision.sentence, figures))

    async def _ask_plugins(self, version: AdapterVersion, decision: Decision) -> Decision:
        """The same decision, unless it is to accept and a plugin vetoes."""
        if not decision.accepted:
            return decision
        opinions = await self._ctx.plugins.call("accept_adapter", candidate=version, evaluation=decision.figures)
        vetoes = [plugin for plugin, opinion in opinions if opinion is False]
        if not vetoes:
            return decision
        sentence = f"{decision.sentence.removesuffix(', serving')}, rejected: vetoed by {', '.join(vetoes)}"
        return Decision(False, sentence, {**decision.figures, "vetoes": vetoes})

    def settings_of(self, c: sa.Connection, agent: str) -> PublishSettings:
        """The publish settings with what the owner set for ``agent`` alone; the global ones if that cannot be used."""
        try:
            return evaluation_settings(self._ctx.settings, get_record(c, agent).settings)
        except UnknownAgentError:
            return self._ctx.settings.publish
        except ConfigError as error:
            logger.warning("the gate of %s is the global one: %s", agent, error)
            return self._ctx.settings.publish

    def _read_settings(self, agent: str) -> PublishSettings:
        with self._ctx.engine.connect() as c:
            return self.settings_of(c, agent)

    def _forget(self, name: str) -> None:
        task = self._tasks.pop(name, None)
        if task is not None:
            task.cancel()
        self.problems.pop(name, None)
        self._not_before.pop(name, None)
