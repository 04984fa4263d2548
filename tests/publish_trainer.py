"""The trainer's rooms for versions and for vLLM, in the test's own process and without its model."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from pathlib import Path

from metaclaw_hooks.types import AdapterVersion
from metaclaw_hooks.wire import Refusal, ServedReply, VersionBody
from metaclaw_trainer.proof import Proof, Prover, read_proof
from metaclaw_trainer.reconcile import Reconciler
from metaclaw_trainer.store import open_store as open_trainer_store
from metaclaw_trainer.versions import StoredVersions
from metaclaw_trainer.vllm_client import VllmClient

from benchmarks.telltale import Telltale


class LocalTrainer:
    """Answers as the trainer's routes do, from its real list of versions and its real reconciler."""

    def __init__(self, folder: Path, url: str) -> None:
        store = open_trainer_store(f"sqlite:///{folder / 'queue.db'}")
        self.versions_ = StoredVersions(store, "test")
        prover = Prover(lambda name: read_proof(store, name), 0.3)
        self.reconciler = Reconciler([VllmClient(url)], self.versions_.served, folder, prover=prover)
        self.heads: list[tuple[str, int]] = []

    async def versions(self, after: int, wait: float = 0.0) -> list[VersionBody]:
        assert wait == 0.0, "nothing here waits"
        return self.versions_.after(after)

    async def set_served(self, versions: Sequence[str], keep: Sequence[str] = ()) -> ServedReply:
        def bring() -> ServedReply:
            unknown = self.versions_.set_served(versions, keep)
            held, failed = self.reconciler.outcome(versions, self.reconciler.once(retry_refused=True))
            reasons = (unknown | failed).items()
            return ServedReply(held=held, failed=[Refusal(id=name, reason=reason) for name, reason in reasons])

        return await asyncio.to_thread(bring)

    async def set_head(self, agent: str, version: int) -> None:
        self.heads.append((agent, version))
        self.versions_.put_head(agent, version)

    def commit(self, agent: str, telltale: Telltale, proof: Proof | None = None) -> None:
        head = self.versions_.head(agent)
        version = AdapterVersion(
            agent=agent,
            number=head.newest + 1,
            base_model="tiny",
            parent=head.head,
            trace_ids=(),
            step=head.newest + 1,
            metrics={},
            sha256=telltale.sha256,
            libraries={},
            path=str(telltale.path),
            created_at=time.time(),
        )
        assert self.versions_.commit(version, [], head.generation, proof)
