"""The training loop, one page:

    claim a batch -> load the head -> step -> checkpoint -> commit (list the version, spend the samples)

A kill at any point leaves either the old head with its samples waiting, or the new one with its samples spent. A folder
that was written but not committed belongs to nobody; it is removed and the same step taken again.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from metaclaw_hooks.names import slug
from metaclaw_hooks.plugins import Plugins
from metaclaw_hooks.types import AdapterVersion, Sample

from metaclaw_trainer.adapters import AdapterConfig
from metaclaw_trainer.advantages import Advantages, Baseline, given
from metaclaw_trainer.agreement import make_proof
from metaclaw_trainer.checkpoints import Checkpoint, read_checkpoint, remove_checkpoint, sweep, write_checkpoint
from metaclaw_trainer.distillation import Distillation
from metaclaw_trainer.engine_thread import EngineThread
from metaclaw_trainer.errors import EngineStoppedError, OutOfMemoryError, TrainerError
from metaclaw_trainer.libraries import library_versions
from metaclaw_trainer.ports import Head, SampleQueue, VersionStore
from metaclaw_trainer.settings import TrainerSettings
from metaclaw_trainer.step import StepResult, TrainingState, train_step

log = logging.getLogger(__name__)

_PATIENCE_WITH_MEMORY = 3  # something else may hold it for a while


class Observer(Protocol):
    """Who is told how batches end."""

    def stepped(self, agent: str, outcome: str, seconds: float) -> None:
        """``outcome``: trained, skipped or failed."""
        ...

    def figures(self, agent: str, values: dict[str, float]) -> None:
        """The metrics of the step that has just ended."""
        ...


class TrainingLoop:
    """Trains whichever agent is ready, one batch at a time. ``run`` belongs in a thread of its own."""

    def __init__(
        self,
        engine: EngineThread,
        queue: SampleQueue,
        versions: VersionStore,
        settings: TrainerSettings,
        observer: Observer | None = None,
        plugins: Plugins | None = None,
    ) -> None:
        self._engine = engine
        self._queue = queue
        self._versions = versions
        self._settings = settings
        self._observer = observer
        self._plugins = plugins
        self._teach = Distillation(engine, settings)
        if plugins:
            for plugin, losses in plugins.call_blocking("register_losses"):
                engine.call(lambda e, p=plugin, own=losses: e.register_losses(p, own))  # type: ignore[misc]
        self._starved: dict[str, int] = {}  # agent -> batches in a row that memory has run out for
        self._loaded: dict[str, tuple[int, TrainingState]] = {}  # agent -> version in the engine, and its state

    def run(self, stop: threading.Event) -> None:
        """Train until ``stop`` is set; a step that is running then is finished."""
        while not stop.is_set():
            try:
                worked = self.run_once()
            except EngineStoppedError:
                return
            except TrainerError:
                log.exception("the training loop could not look for work; trying again")
                worked = False
            if not worked:
                stop.wait(self._settings.poll_interval)

    def run_once(self) -> bool:
        """Train one batch of the agent that has waited longest; whether there was one."""
        for agent, wanted in self._queue.ready():
            if samples := self._queue.claim(agent, wanted):
                self._train(agent, samples)
                return True
        return False

    def folder(self, agent: str, number: int) -> Path:
        """Where version ``number`` of ``agent`` lies."""
        return self._settings.folder / "adapters" / slug(agent) / f"v{number}"

    def forget(self, agent: str) -> None:
        """Take the agent's adapter out of the engine; its next step loads the head from disk."""
        self._loaded.pop(agent, None)
        self._engine.call(lambda e: e.drop(_key(agent)))

    def _train(self, agent: str, samples: Sequence[Sample]) -> None:
        started = time.monotonic()
        ids = [sample.id for sample in samples]
        try:
            outcome = self._step(agent, samples)
        except EngineStoppedError:
            self._queue.release(ids)
            raise
        except Exception as error:  # a bad step of one agent must not end everybody's training
            log.warning(
                "a step of %s failed, its %d samples wait again: %s",
                agent,
                len(ids),
                error,
                exc_info=not isinstance(error, TrainerError),
            )
            self.forget(agent)
            self._give_back(agent, samples, error)
            outcome = "failed"
        else:
            self._starved.pop(agent, None)
        if self._observer:
            self._observer.stepped(agent, outcome, time.monotonic() - started)

    def _give_back(self, agent: str, samples: Sequence[Sample], error: Exception) -> None:
        """The samples wait again; the longest does not when memory has run out for it again and again."""
        ids = [sample.id for sample in samples]
        if isinstance(error, OutOfMemoryError):
            self._starved[agent] = self._starved.get(agent, 0) + 1
            if self._starved[agent] >= _PATIENCE_WITH_MEMORY:
                longest = max(samples, key=lambda sample: len(sample.token_ids))
                reason = (
                    f"out of memory {self._starved.pop(agent)} times with its {len(longest.token_ids)} tokens: {error}"
                )
                self._queue.set_aside([longest.id], reason)
                ids.remove(longest.id)
        self._queue.release(ids, f"{type(error).__name__}: {error}")

    def _step(self, agent: str, samples: Sequence[Sample]) -> str:
        head = self._versions.head(agent)
        state = self._load(agent, head)
        result = train_step(
            self._engine, _key(agent), state, samples, head.head, self._settings, advise=self._advise, teach=self._teach
        )
        for identity, reason in result.aside:
            self._queue.set_aside([identity], reason)
        if result.aside:
            log.warning("%d samples of %s are set aside, such as %s: %s", len(result.aside), agent, *result.aside[0])
        if not result.trained:
            left = [s.id for s in samples if s.id not in dict(result.aside)]
            if result.silent and left:
                log.info("%s: %s", agent, result.silent)
                self._versions.skipped(agent, left, result.silent)
            return "skipped"
        return "trained" if self._publish(agent, head, result) else "failed"

    def _load(self, agent: str, head: Head) -> TrainingState:
        version, state = self._loaded.get(agent, (-1, None))
        if state is not None and version == head.head:
            return state
        self.forget(agent)
        key, config = _key(agent), AdapterConfig.of(self._settings)
        if head.head == 0:
            self._engine.call(lambda e: e.create(key, config, seed=self._settings.seed))
            state = TrainingState.fresh(self._settings.seed, agent)
        else:
            fingerprint = self._engine.call(lambda e: e.base.fingerprint)
            found = read_checkpoint(self.folder(agent, head.head), fingerprint, config)
            self._engine.call(lambda e: e.restore(key, found.adapter))
            state = TrainingState.from_json(found.training)
        self._loaded[agent] = (head.head, state)
        return state

    def _publish(self, agent: str, head: Head, result: StepResult) -> bool:
        number = head.newest + 1
        target = self.folder(agent, number)
        ids = [sample.id for sample in result.trained]
        if self._listed(agent, number):
            return self._thrown_away(agent, ids)
        sweep(target.parent)
        remove_checkpoint(target)  # of a step that was killed before it was committed: nobody has seen it
        key = _key(agent)
        adapter, fingerprint = self._engine.call(lambda e: (e.state(key), e.base.fingerprint))
        created_at = time.time()
        traces = tuple(turn.trace_id for sample in result.trained for turn in sample.turns)
        lineage = {
            "agent": agent,
            "number": number,
            "parent": head.head,
            "trace_ids": traces,
            "sample_ids": [sample.id for sample in result.trained],
            "metrics": dict(result.metrics),
            "libraries": library_versions(),
            "created_at": created_at,
        }
        checkpoint = Checkpoint(adapter, result.state.to_json(), lineage)
        written = write_checkpoint(target, checkpoint, self._settings.base_model, fingerprint)
        version = AdapterVersion(
            agent=agent,
            number=number,
            base_model=self._settings.base_model,
            parent=head.head,
            trace_ids=traces,
            step=result.state.step,
            metrics=dict(result.metrics),
            sha256=written.sha256,
            libraries=library_versions(),
            path=str(written.path),
            created_at=created_at,
        )
        if not self._versions.commit(version, ids, head.generation, make_proof(self._engine, key, result.trained)):
            if not self._listed(agent, number):
                remove_checkpoint(target)
            return self._thrown_away(agent, ids)
        self._loaded[agent] = (number, result.state)
        log.info("%s is trained from v%d on %d samples: %s", version.name, head.head, len(ids), _line(result.metrics))
        self._tell(agent, result.metrics)
        return True

    def _listed(self, agent: str, number: int) -> bool:
        """Whether another trainer took this one for dead, went on with the agent, and made that version itself."""
        return self._versions.head(agent).newest >= number

    def _thrown_away(self, agent: str, ids: Sequence[str]) -> bool:
        log.info("a step of %s was thrown away: head put back, sample recalled, or agent taken over meanwhile", agent)
        self.forget(agent)
        self._queue.release(ids)
        return False

    def _advise(self, samples: Sequence[Sample], baseline: Baseline) -> Advantages | None:
        """The first opinion of a ``compute_advantages`` plugin."""
        opinions = self._plugins.call_blocking("compute_advantages", batch=samples) if self._plugins else []
        return given(opinions[0][1], samples, baseline, self._settings) if opinions else None

    def _tell(self, agent: str, metrics: Mapping[str, float]) -> None:
        if self._observer:
            self._observer.figures(agent, dict(metrics))
        if self._plugins:
            self._plugins.call_blocking("after_step", agent=agent, metrics=metrics)


def _key(agent: str) -> str:
    return f"agent:{agent}"  # apart from the sessions of the fork's wire


def _line(metrics: Mapping[str, float]) -> str:
    shown = ("reward", "loss", "grad_norm", "kl_base", "gap", "entropy", "seconds")
    return ", ".join(f"{name} {metrics[name]:.3g}" for name in shown if name in metrics)
