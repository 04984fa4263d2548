"""Training runs of the fork's wire: many at once, each an adapter of its own in the engine.

A run lives as long as the process: after a restart its session id is unknown, and a client goes on from a checkpoint.
The paths of checkpoints are kept in the store, and no other path is ever read.
"""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import sqlalchemy as sa

from metaclaw_trainer.adapters import AdapterConfig, OptimiserOptions
from metaclaw_trainer.batching import datum_of_lists
from metaclaw_trainer.checkpoints import Checkpoint, read_checkpoint, remove_checkpoint, write_checkpoint
from metaclaw_trainer.engine_thread import EngineThread
from metaclaw_trainer.errors import (
    ConflictError,
    InvalidDatumError,
    NonFiniteError,
    OutOfMemoryError,
    TooManySessionsError,
    UnknownSessionError,
    UnknownVersionError,
)
from metaclaw_trainer.losses import LossOptions
from metaclaw_trainer.objective import BatchResult
from metaclaw_trainer.schema import issued_paths, run_weights
from metaclaw_trainer.settings import TrainerSettings
from metaclaw_trainer.store import Store
from metaclaw_trainer.versions import Wanted, folder_size

log = logging.getLogger(__name__)

Lists = tuple[Sequence[int], Sequence[int], Sequence[float], Sequence[float]]  # inputs, targets, logprobs, advantages
KEPT_WEIGHTS = 2  # saved weights of a run that stay on disk: the newest, and the one that vLLM may still be leaving


@dataclass(slots=True)
class Run:
    """One training run. ``lock`` is held by whoever changes it."""

    id: str
    caller: str
    config: AdapterConfig
    used_at: float
    losses: list[float] = field(default_factory=list)  # of the calls that the next step uses
    saves: int = 0
    saved_at: float = 0.0  # when its newest weights were
    weights: list[Wanted] = field(default_factory=list)  # oldest first
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def key(self) -> str:
        """Of its adapter in the engine; no agent can be called so."""
        return f"_run_{self.id}"


@dataclass(frozen=True, slots=True)
class Created:
    """A new run."""

    run: Run
    trainable: int  # parameters of its adapter
    total: int  # and of the base model


class Runs:
    """All open runs. Safe to use from several threads."""

    def __init__(self, engine: EngineThread, store: Store, owner: str, settings: TrainerSettings) -> None:
        self._engine = engine
        self._store = store
        self._owner = owner
        self._settings = settings
        self._folder = settings.folder / "runs"
        self._lock = threading.Lock()
        self._runs: dict[str, Run] = {}

    def create(self, caller: str, base_model: str, rank: int) -> Created:
        """Open a run.

        Raises:
            ConflictError: if this trainer holds another base model.
            TooManySessionsError: if no more may be open.
        """
        self._check_base(base_model)
        self._close_idle()
        scale = self._settings.alpha / self._settings.rank
        config = AdapterConfig(rank, scale * rank, tuple(sorted(self._settings.targets)))
        run = Run(uuid.uuid4().hex, caller, config, time.monotonic())
        with self._lock:
            if len(self._runs) >= self._settings.max_sessions:
                raise TooManySessionsError(
                    f"{len(self._runs)} sessions are open, as many as metaclaw.trainer.max_sessions allows; "
                    "one that is not used is closed by itself"
                )
            self._runs[run.id] = run
        try:
            trainable, base = self._engine.call(
                lambda e: (
                    e.create(run.key, config, self._settings.seed),
                    sum(p.numel() for name, p in e.base.model.named_parameters() if ".lora_" not in name),
                )
            )
        except BaseException:
            with self._lock:
                del self._runs[run.id]
            raise
        log.info("session %s opened: rank %d", run.id, rank)
        return Created(run, trainable, base + trainable)

    def _check_base(self, wanted: str) -> None:
        held = self._settings.base_model
        if wanted and wanted != held and Path(wanted).name != Path(held).name:
            raise ConflictError(
                f"this trainer holds {Path(held).name}, not {wanted[:200]}: set metaclaw.base_model and start it again"
            )

    def get(self, caller: str, session_id: str) -> Run:
        """A run of the caller's.

        Raises:
            UnknownSessionError: if there is none of that id, or it is another's.
        """
        with self._lock:
            run = self._runs.get(session_id)
        if run is None or run.caller != caller:
            raise UnknownSessionError(
                f"no session {session_id[:64]!r} is open here: create one, and load your last checkpoint into it "
                "(a restart of the trainer ends all sessions)"
            )
        run.used_at = time.monotonic()
        return run

    def forward_backward(self, run: Run, given: Sequence[Lists], loss: str) -> BatchResult:
        """Add the gradient of the sum of the loss over all tokens to that of the run."""
        datums = []
        for index, lists in enumerate(given):
            try:
                datums.append(datum_of_lists(*lists))
            except InvalidDatumError as error:
                raise InvalidDatumError(f"datum {index}: {error}") from error
        options = LossOptions(
            ppo_clip=self._settings.ppo_clip,
            cispo_clip=self._settings.cispo_clip,
            normalisation="constant",
            normalisation_constant=1.0,
        )
        with run.lock:
            try:
                result = self._engine.call(lambda e: e.forward_backward(run.key, datums, loss, options))
            except (OutOfMemoryError, NonFiniteError):
                run.losses.clear()  # the engine dropped the whole gradient
                raise
            run.losses.append(result.loss)
        return result

    def optim_step(self, run: Run, learning_rate: float) -> tuple[int, float, float]:
        """One AdamW step: steps so far, gradient norm, mean loss of the calls that it used.

        Raises:
            ConflictError: if there is no gradient.
        """
        settings = self._settings
        options = OptimiserOptions(
            learning_rate, settings.betas, settings.eps, settings.weight_decay, settings.grad_clip
        )
        with run.lock:
            if not run.losses:
                raise ConflictError("there is no gradient: call /v1/train/forward_backward before optim_step")
            losses, run.losses = run.losses, []
            moved = self._engine.call(lambda e: e.optim_step(run.key, options))
        return int(moved["step"]), moved["grad_norm"], sum(losses) / len(losses)

    def save_weights(self, run: Run, name: str) -> tuple[Wanted, int]:
        """Write the run's adapter where vLLM can load it, under a name and path of its own; steps so far."""
        with run.lock:
            state = self._engine.call(lambda e: e.state(run.key))
            run.saves += 1
            label = f"{name or f'step_{state.step:04d}'}-{run.saves}"
            path = self._write(run, "weights", label, Checkpoint(state, {}))
            run.weights.append(Wanted(f"run.{run.id}.{run.saves}", str(path)))
            run.saved_at = time.monotonic()
            self._want(run)
            for old in run.weights[:-KEPT_WEIGHTS]:
                self._remove(Path(old.path))
            del run.weights[:-KEPT_WEIGHTS]
            return run.weights[-1], state.step

    def save_checkpoint(self, run: Run, name: str) -> Path:
        """Write all that training goes on from.

        Raises:
            ConflictError: if there is a gradient that no step has used: it would be lost without a word.
        """
        with run.lock:
            if run.losses:
                raise ConflictError("a gradient is waiting for its optim_step, and no checkpoint keeps it: step first")
            state = self._engine.call(lambda e: e.state(run.key))
            run.saves += 1
            return self._write(run, "checkpoints", f"{name}-{run.saves}", Checkpoint(state, {}))

    def load_checkpoint(self, run: Run, path: str) -> int:
        """Go on from a checkpoint that the same caller was given; its steps. On failure the run is as it was.

        Raises:
            UnknownVersionError: if this server never gave that path to the caller.
            ConflictError: if its files were removed to save space.
            CheckpointRefusedError: if it does not fit the base model, or is not what was written.
        """
        with self._store.read() as c:
            query = sa.select(issued_paths.c.path, issued_paths.c.removed_at).where(
                issued_paths.c.path == path,
                issued_paths.c.caller == run.caller,
                issued_paths.c.kind == "checkpoints",
            )
            issued = c.execute(query).first()
        if issued is None:
            raise UnknownVersionError(
                "this server never gave you that checkpoint path; use one from /v1/checkpoint/save"
            )
        if issued.removed_at is not None:
            raise ConflictError("the files of that checkpoint were removed to save space: load a newer one")
        with run.lock:
            fingerprint = self._fingerprint()
            state = read_checkpoint(Path(issued.path), fingerprint).adapter
            self._engine.call(lambda e: e.restore(run.key, state))
            run.config, run.losses = state.config, []
        return state.step

    def newest_weights(self, caller: str, session_id: str | None) -> Wanted | None:
        """The weights that answer for a caller: of the session, else those that the caller saved last."""
        if session_id is not None:
            run = self.get(caller, session_id)
            return run.weights[-1] if run.weights else None
        with self._lock:
            mine = [run for run in self._runs.values() if run.caller == caller and run.weights]
        if not mine:
            return None
        return max(mine, key=lambda run: run.saved_at).weights[-1]

    def wanted(self) -> list[Wanted]:
        """The newest weights of every session, of other trainers too: vLLM shall hold them."""
        with self._store.read() as c:
            return [Wanted(row.name, row.path) for row in c.execute(sa.select(run_weights))]

    def _want(self, run: Run) -> None:
        with self._store.write() as c:
            c.execute(run_weights.delete().where(run_weights.c.session_id == run.id))
            if run.weights:
                newest = run.weights[-1]
                row = {"session_id": run.id, "name": newest.name, "path": newest.path, "owner": self._owner}
                c.execute(run_weights.insert().values(**row))

    def close(self, run: Run) -> None:
        """End a run; its checkpoints stay, its weights go."""
        with self._lock:
            if self._runs.pop(run.id, None) is None:
                return
        with run.lock:
            self._engine.call(lambda e: e.drop(run.key))
            gone, run.weights = run.weights, []
            self._want(run)
            for saved in gone:
                self._remove(Path(saved.path))
        log.info("session %s closed", run.id)

    def _close_idle(self) -> None:
        oldest = time.monotonic() - self._settings.session_idle_seconds
        with self._lock:
            idle = [run for run in self._runs.values() if run.used_at < oldest]
        for run in idle:
            self.close(run)

    def _fingerprint(self) -> str:
        return self._engine.call(lambda e: e.base.fingerprint)

    def _write(self, run: Run, kind: str, label: str, checkpoint: Checkpoint) -> Path:
        target = self._folder / run.id / kind / label
        write_checkpoint(target, checkpoint, self._settings.base_model, self._fingerprint())
        row = {"path": str(target), "caller": run.caller, "session_id": run.id, "kind": kind, "at": time.time()}
        with self._store.write() as c:
            c.execute(issued_paths.insert().values(**row, size=folder_size(target)))
        return target

    def _remove(self, path: Path) -> None:
        remove_checkpoint(path)
        with self._store.write() as c:
            c.execute(issued_paths.delete().where(issued_paths.c.path == str(path)))
