"""The rooms of one trainer process, wired together once and handed to whoever needs them."""

from __future__ import annotations

from dataclasses import dataclass

from metaclaw_hooks.plugins import Plugins

from metaclaw_trainer.agents import AgentBook
from metaclaw_trainer.auth import KeyRing
from metaclaw_trainer.engine_thread import EngineThread
from metaclaw_trainer.metrics import Metrics
from metaclaw_trainer.owners import Owner
from metaclaw_trainer.reconcile import Reconciler
from metaclaw_trainer.runs import Runs
from metaclaw_trainer.sample_queue import StoredQueue
from metaclaw_trainer.sampler import Sampler
from metaclaw_trainer.settings import TrainerSettings
from metaclaw_trainer.store import Store
from metaclaw_trainer.versions import StoredVersions
from metaclaw_trainer.vllm_client import VllmClient


@dataclass(frozen=True, slots=True)
class Services:
    """Everything that a route may use."""

    settings: TrainerSettings
    store: Store
    owner: Owner
    keys: KeyRing
    queue: StoredQueue
    agents: AgentBook
    versions: StoredVersions
    engine: EngineThread
    runs: Runs
    vllm: tuple[VllmClient, ...]
    reconciler: Reconciler
    sampler: Sampler
    plugins: Plugins
    metrics: Metrics
    device: str
