"""One trainer process: its rooms are built, started, served over HTTP, and ended in the right order."""

from __future__ import annotations

import logging
import os
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn
from metaclaw_hooks.plugins import create_plugin_manager
from metaclaw_hooks.watching import FolderWatch
from transformers.utils.logging import disable_progress_bar

from metaclaw_trainer.agents import AgentBook
from metaclaw_trainer.app import create_app
from metaclaw_trainer.auth import KeyRing
from metaclaw_trainer.engine_thread import EngineThread
from metaclaw_trainer.loop import TrainingLoop
from metaclaw_trainer.metrics import Metrics
from metaclaw_trainer.owners import Owner
from metaclaw_trainer.proof import Prover, read_proof
from metaclaw_trainer.reconcile import Reconciler
from metaclaw_trainer.retention import Forgetting, Retention
from metaclaw_trainer.runs import Runs
from metaclaw_trainer.sample_queue import Limits, StoredQueue
from metaclaw_trainer.sampler import Sampler
from metaclaw_trainer.services import Services
from metaclaw_trainer.settings import TrainerSettings
from metaclaw_trainer.store import open_store
from metaclaw_trainer.training import TrainingThread
from metaclaw_trainer.versions import StoredVersions
from metaclaw_trainer.vllm_client import VllmClient

log = logging.getLogger(__name__)

TRAINER_HOOKS = ("accept_sample", "compute_advantages", "register_losses", "after_step")
# Seconds: more than our clients keep an idle connection (5), or they would use one that is being closed.
KEEP_ALIVE = 30
STOP_SECONDS = 20.0  # for a running step to end by itself


@contextmanager
def running(settings: TrainerSettings) -> Iterator[Services]:
    """The rooms of one trainer, started; stopped when the block ends.

    Raises:
        StoreError: if the store cannot be opened.
        ModelLoadError: if the base model cannot be loaded.
    """
    store = open_store(settings.store_url)
    engine = EngineThread(settings)
    engine.start()
    owner = Owner(store, settings.folder / "owners", settings.lease_seconds)
    vocabulary, device = engine.call(lambda e: (e.base.vocabulary, str(e.base.device)))
    limits = Limits(vocabulary, settings.max_sample_tokens, settings.max_queued, settings.batch_size)
    versions = StoredVersions(store, owner.id)
    runs = Runs(engine, store, owner.id, settings)
    clients = tuple(VllmClient(url, settings.vllm_api_key) for url in settings.vllm_urls)
    prover = Prover(lambda name: read_proof(store, name), settings.gap_threshold)
    reconciler = Reconciler(clients, lambda: [*versions.served(), *runs.wanted()], settings.folder, prover=prover)
    services = Services(
        settings=settings,
        store=store,
        owner=owner,
        keys=KeyRing(settings.keys_file),
        queue=StoredQueue(store, owner.id, limits),
        agents=AgentBook(store, settings.batch_size),
        versions=versions,
        engine=engine,
        runs=runs,
        vllm=clients,
        reconciler=reconciler,
        sampler=Sampler(clients, runs, versions, reconciler, vocabulary),
        plugins=create_plugin_manager(settings.plugins_path, settings.hook_timeout, wanted=TRAINER_HOOKS),
        metrics=Metrics(),
        device=device,
    )
    services.metrics.watch(services.agents, services.reconciler.states)
    loop = TrainingLoop(engine, services.queue, versions, settings, services.metrics, services.plugins)
    budget = int(settings.disk_budget_gib * 2**30)
    retention = Retention(store, settings.folder, budget, settings.session_idle_seconds)
    training = TrainingThread(loop, owner, (retention, Forgetting(store, settings.keep_settled_days)))
    watch = FolderWatch(services.plugins)
    watch.start()
    services.reconciler.start()
    training.start()
    try:
        yield services
    finally:
        training.stop(STOP_SECONDS)
        watch.stop()
        services.reconciler.stop()
        engine.stop(timeout=1.0)
        owner.close()
        for client in clients:
            client.close()
        store.close()


def serve(settings: TrainerSettings, listener: socket.socket) -> int:
    """Serve HTTP on ``listener`` until SIGINT or SIGTERM; the exit code."""
    disable_progress_bar()  # this is a log, not a screen
    with running(settings) as services:
        config = uvicorn.Config(
            create_app(services),
            log_config=None,
            access_log=False,
            timeout_graceful_shutdown=3,
            timeout_keep_alive=KEEP_ALIVE,
            server_header=False,
        )
        host, port = listener.getsockname()[:2]
        log.info("training %s on %s; listening on http://%s:%d", settings.base_model, services.device, host, port)
        # uvicorn raises the signal that ended it once more when it is done; by then it has been obeyed.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, _obeyed)
        uvicorn.Server(config).run(sockets=[listener])
    if not services.engine.stop(timeout=0):
        logging.shutdown()
        os._exit(0)  # a step that would not end is in native code, which must not be torn down under it
    return 0


def _obeyed(_number: int, _frame: object) -> None:
    pass
