"""Every vLLM holds exactly the adapters that it shall hold: kept true after its restarts and ours.

The wanted set lies in the store. Each vLLM is asked what it has; what is missing is loaded, what is ours and not wanted
is unloaded. An adapter is ours if its folder lies below ours, so those that others loaded are left alone.

One adapter that vLLM refuses, or does not answer about, keeps no other away: what is held is counted first, what failed
before is tried last, and one look waits for one time-out at most.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from metaclaw_trainer.errors import TrainerError, VllmRefusedError, VllmSilentError, VllmUnavailableError
from metaclaw_trainer.proof import Prover
from metaclaw_trainer.versions import Wanted
from metaclaw_trainer.vllm_client import VllmClient

log = logging.getLogger(__name__)

REFUSED_PAUSE = 30.0  # seconds until an adapter that vLLM refused is tried again, unless somebody asks
SILENT_PAUSE = 60.0  # seconds until one about which vLLM did not answer is tried again, whoever asks


@dataclass(slots=True)
class ReplicaState:
    """What one look at one vLLM brought."""

    url: str
    reachable: bool = False
    held: set[str] = field(default_factory=set)
    failed: dict[str, str] = field(default_factory=dict)  # name -> reason
    error: str | None = None  # why nothing could be done
    loaded: int = 0
    unloaded: int = 0


@dataclass(frozen=True, slots=True)
class _Failure:
    """Why a vLLM does not hold an adapter, and when that is tried again."""

    reason: str
    retry_at: float  # monotonic
    silent: bool  # it took a whole time-out, so nobody who asks waits for it before ``retry_at``


class Reconciler:
    """Brings each vLLM to the wanted set.

    Args:
        clients: one for each replica.
        wanted: reads the wanted set from the store.
        folder: adapters below it are ours.
        prover: sees that vLLM gives a version the log-probs that the trainer gave it; None: nobody does.
        interval: seconds between looks, in the thread that ``start`` runs.
    """

    def __init__(
        self,
        clients: Sequence[VllmClient],
        wanted: Callable[[], Sequence[Wanted]],
        folder: Path,
        interval: float = 2.0,
        prover: Prover | None = None,
    ) -> None:
        self._clients = list(clients)
        self._wanted = wanted
        self._folder = folder.resolve()
        self._interval = interval
        self._prover = prover
        self._proven: list[set[str]] = [set() for _ in self._clients]  # what each vLLM has been seen to hold rightly
        self._locks = [threading.Lock() for _ in self._clients]
        self._failures: list[dict[str, _Failure]] = [{} for _ in self._clients]
        self.states = [ReplicaState(client.url) for client in self._clients]
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._pool = ThreadPoolExecutor(max(1, len(self._clients)), thread_name_prefix="vllm")

    def start(self) -> None:
        self._thread = threading.Thread(target=self._run, name="reconcile", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        if self._thread:
            self._thread.join(timeout=60)
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _run(self) -> None:
        while not self._stop.wait(self._interval):
            try:
                self.once()
            except TrainerError as error:
                log.error("cannot bring vLLM to the wanted set: %s", error)

    def once(self, retry_refused: bool = False) -> list[ReplicaState]:
        """One look at every replica, all at once. ``retry_refused``: also what was refused a moment ago."""
        jobs = [self._pool.submit(self._replica, i, retry_refused) for i in range(len(self._clients))]
        return [job.result() for job in jobs]

    def outcome(self, names: Sequence[str], states: Sequence[ReplicaState]) -> tuple[list[str], dict[str, str]]:
        """Of ``names``: those that every replica holds, and for the others the reason of the first that does not."""
        held, failed = [], {}
        for name in names:
            reasons = [
                state.failed.get(name) or state.error or "not loaded yet" for state in states if name not in state.held
            ]
            if reasons:
                failed[name] = reasons[0]
            else:
                held.append(name)
        return held, failed

    def _replica(self, index: int, retry_refused: bool) -> ReplicaState:
        client, state = self._clients[index], ReplicaState(self._clients[index].url)
        with self._locks[index]:
            before = self.states[index]
            try:
                self._bring(index, state, retry_refused)
                state.reachable = True
                if not before.reachable:
                    log.info("vLLM at %s answers; it holds %d adapters of ours", client.url, len(state.held))
            except (VllmUnavailableError, VllmRefusedError) as error:
                self._proven[index].clear()  # it may be another one that answers next: started again, and with what?
                state.error = str(error)
                if before.reachable:
                    log.warning("%s", error)
            self.states[index] = state
        return state

    def _bring(self, index: int, state: ReplicaState, retry_refused: bool) -> None:
        client, proven = self._clients[index], self._proven[index]
        there = {model.name: model.root for model in client.models() if model.parent is not None}
        # Read after the list: whoever loads an adapter has written before that it is wanted, so what was just loaded
        # by somebody else is never taken for unwanted.
        wanted = {entry.name: entry.path for entry in self._wanted()}
        proven.intersection_update(name for name, root in there.items() if wanted.get(name) == root)
        state.held.update(proven)
        missing = {name: path for name, path in wanted.items() if name not in proven}
        self._fill(index, state, missing, there, retry_refused)
        for name, root in there.items():
            if name not in wanted and self._is_ours(root):
                client.unload(name)
                state.unloaded += 1
                log.info("unloaded %s from vLLM at %s", name, client.url)

    def _fill(
        self, index: int, state: ReplicaState, missing: Mapping[str, str], there: Mapping[str, str], retry_refused: bool
    ) -> None:
        """Load and prove what is missing (name -> folder), until vLLM does not answer about one of them."""
        client, failures = self._clients[index], self._failures[index]
        for name in failures.keys() - missing.keys():
            del failures[name]
        state.failed.update({name: failure.reason for name, failure in failures.items()})
        for name in sorted(missing, key=failures.__contains__):
            before = failures.get(name)
            if before and time.monotonic() < before.retry_at and (before.silent or not retry_refused):
                continue
            try:
                state.loaded += self._put(client, name, missing[name], there.get(name))
            except VllmRefusedError as error:
                self._note_failure(index, state, name, str(error))
                continue
            except VllmSilentError as error:
                client.models()  # raises if it answers nothing at all
                self._note_failure(index, state, name, f"{error}, though it answers others; see its log", silent=True)
                return
            except VllmUnavailableError as error:
                self._note_failure(index, state, name, str(error))
                raise
            failures.pop(name, None)
            state.failed.pop(name, None)
            self._proven[index].add(name)
            state.held.add(name)

    def _note_failure(self, index: int, state: ReplicaState, name: str, reason: str, *, silent: bool = False) -> None:
        pause = SILENT_PAUSE if silent else REFUSED_PAUSE
        self._failures[index][name] = _Failure(reason, time.monotonic() + pause, silent)
        state.failed[name] = reason
        log.error("%s is not held: %s", name, reason)

    def _put(self, client: VllmClient, name: str, path: str, root: str | None) -> bool:
        """See that vLLM holds under ``name`` what the trainer made; whether it was loaded for that.

        What was loaded here and is found wrong is unloaded. What was there already may be answering requests, and a
        gateway would load it again under the next one, so it is left.

        Args:
            root: the folder from which vLLM holds it already, if it does.
        """
        if root == path:  # by another process, or before this one began
            if self._prover:
                try:
                    self._prover.check(client, name)
                except VllmRefusedError as error:
                    left = "it was there already and may be answering, so it is left"
                    cure = "start that vLLM again with the trainer's base model"
                    raise VllmRefusedError(f"{error} ({left}; {cure})", error.status) from error
            return False
        if root is not None:  # of that name, but another folder: from a home that is gone
            client.unload(name)
        client.load(name, path)
        try:
            if self._prover:
                self._prover.check(client, name)
        except VllmRefusedError:
            client.unload(name)
            raise
        log.info("loaded %s into vLLM at %s", name, client.url)
        return True

    def _is_ours(self, root: str) -> bool:
        path = Path(root)
        return path.is_absolute() and path.resolve().is_relative_to(self._folder)
