"""What is kept of a request after the call: its traces, committed before the client gets the last byte."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace
from typing import Any

import sqlalchemy as sa
from metaclaw_hooks.plugins import Plugins
from metaclaw_hooks.types import Trace

from metaclaw_plugin.capture.assemble import Origin, traces_of
from metaclaw_plugin.capture.reply import described
from metaclaw_plugin.capture.transport import Recording
from metaclaw_plugin.capture.writer import LOST, TraceWriter
from metaclaw_plugin.gateway import sessions
from metaclaw_plugin.gateway.current import CurrentRequest, Plan
from metaclaw_plugin.gateway.metrics import Metrics
from metaclaw_plugin.gateway.sessions import Turn
from metaclaw_plugin.settings import Settings

logger = logging.getLogger(__name__)

Batch = tuple[str, Sequence[Trace], Callable[[sa.Connection], None]]


class Keeper:
    """Turns what passed into traces and hands them to the writer, once for each request."""

    def __init__(self, settings: Settings, writer: TraceWriter, plugins: Plugins, metrics: Metrics) -> None:
        self._settings = settings
        self._writer = writer
        self._plugins = plugins
        self._metrics = metrics

    async def commit(self, current: CurrentRequest, alone: bool) -> None:
        """Store what was answered; returns once it is committed, or when the wait for that is over.

        ``alone``: no other request is on its way.
        """
        if (batch := await self._batch(current)) is None:
            return
        started = time.perf_counter()
        written = await self._writer.write(*batch, self._settings.gateway.commit_timeout, alone)
        self._metrics.committed(written, time.perf_counter() - started)

    def keep_rest(self, current: CurrentRequest) -> None:
        """The client is gone or the upstream failed: store what there is, without a wait."""
        if current.recording is not None and not current.committed:
            current.recording.end()
            in_background(self._submit(current))  # the request's own task may be on its way out

    async def _submit(self, current: CurrentRequest) -> None:
        try:
            if (batch := await self._batch(current)) is not None:
                self._writer.submit(*batch)
        except asyncio.CancelledError:  # the process ends
            if current.plan is not None:
                self._writer.count(LOST, current.plan.agent.name, 1)
            raise

    async def _batch(self, current: CurrentRequest) -> Batch | None:
        """What is to be stored; nothing, and a count, if that cannot be told. The client gets its answer either way."""
        plan, recording = current.plan, current.recording
        if current.committed or plan is None or plan.turn is None or recording is None:
            return None
        current.committed = True
        batch: Batch | None = None
        try:
            if (failure := recording.reply.failure) is None:
                batch = await self._assembled(current, plan, plan.turn, recording)
            else:
                self._lose(plan.agent.name, failure)
        except asyncio.CancelledError:
            current.committed = False  # the client has left while a plugin thought: ``keep_rest`` does it all again
            raise
        except Exception as error:  # noqa: BLE001 - isolation boundary: upstreams and clients may say anything
            self._lose(plan.agent.name, described(error))
        recording.forget()  # LiteLLM's background tasks hold on to this request's context for a while
        return batch

    def _lose(self, agent: str, failure: str) -> None:
        logger.error(
            "an answer to %s makes no trace: %s; it is counted as lost, report it with the kind of upstream",
            agent,
            failure,
        )
        self._writer.count(LOST, agent, 1)

    async def _assembled(self, current: CurrentRequest, plan: Plan, turn: Turn, recording: Recording) -> Batch | None:
        complete = recording.complete
        origin = _origin(current.dialect, plan, turn)
        traces = traces_of(origin, recording, current.response_id, self._settings.capture)
        if not traces:
            return None
        answers = [trace.response for trace in traces]
        loop_goes_on = any(answer.get("tool_calls") for answer in answers)
        pin = plan.route.adapter_version if loop_goes_on else None
        kept = tuple([await self._redacted(trace) for trace in traces])

        def after(c: sa.Connection) -> None:
            sessions.settle(c, turn, answers if complete else (), traces[0].finished_at, pin)

        return plan.agent.name, kept, after

    async def _redacted(self, trace: Trace) -> Trace:
        changed: Trace | None = await self._plugins.call_first("redact_trace", trace=trace)
        if changed is None:
            return trace
        return replace(changed, id=trace.id, agent=trace.agent, trainable=False, reason="redacted")


_tasks: set[asyncio.Task[None]] = set()


def in_background(work: Coroutine[Any, Any, None]) -> None:
    """Run ``work`` beside the present task, and past its end."""
    task = asyncio.get_running_loop().create_task(work)
    _tasks.add(task)  # the loop itself holds tasks only weakly
    task.add_done_callback(_tasks.discard)


def _origin(dialect: str, plan: Plan, turn: Turn) -> Origin:
    return Origin(
        trace_id=plan.trace_id,
        agent=plan.agent.name,
        session=turn.session,
        turn=turn.turn,
        exchange=turn.exchange,
        kind=turn.kind,
        dialect=dialect,
        model=plan.upstream_name,
        adapter_version=plan.route.adapter_version,
        skills=plan.skills,
        skill_generation=plan.skill_generation,
    )
