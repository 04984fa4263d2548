"""The worker: a handful of tasks that each look for work, do it, and never take one another down.

scoring ─► forwarding ─► tracking            sessions, retention, upkeep
publishing, modes                            evolution
"""

from __future__ import annotations

import asyncio
import logging
import signal
import time

import httpx

from metaclaw_plugin.errors import TrainerUnavailableError
from metaclaw_plugin.settings import Settings
from metaclaw_plugin.store import leases
from metaclaw_plugin.store.counters import count
from metaclaw_plugin.store.engine import open_store
from metaclaw_plugin.trainer_client import TrainerClient
from metaclaw_plugin.worker.backoff import Backoff
from metaclaw_plugin.worker.context import WorkerContext
from metaclaw_plugin.worker.tasks import Round, tasks_for
from metaclaw_plugin.worker.wiring import load_plugins

logger = logging.getLogger(__name__)

STOP_GRACE = 10.0  # seconds that a round has to end by itself when the worker is stopped


def main(settings: Settings) -> None:
    """Run the worker until SIGTERM or SIGINT."""
    asyncio.run(_run_until_signal(settings))


async def _run_until_signal(settings: Settings) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for name in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(name, stop.set)
    await run_worker(settings, stop)


async def run_worker(settings: Settings, stop: asyncio.Event) -> None:
    """Run all tasks until ``stop`` is set; then end cleanly and give back every lease.

    Raises:
        StoreError: if the store cannot be opened.
    """
    engine = open_store(settings.store_url)
    plugins = load_plugins(settings, engine)
    async with httpx.AsyncClient(trust_env=False) as http:
        trainer = TrainerClient(http, settings.rl.remote_url, settings.rl.remote_api_key)
        ctx = WorkerContext(settings, engine, plugins, trainer, http, leases.this_worker())
        await asyncio.to_thread(_take_over, ctx)
        running = [asyncio.create_task(keep_doing(ctx, task, stop), name=task.name) for task in tasks_for(ctx)]
        logger.info("the worker runs: %s", ", ".join(task.get_name() for task in running))
        try:
            await stop.wait()
            await asyncio.wait(running, timeout=STOP_GRACE)
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)
            await asyncio.to_thread(_give_back, ctx)
            plugins.close()
            engine.dispose()
    logger.info("the worker has ended")


async def keep_doing(ctx: WorkerContext, task: Round, stop: asyncio.Event) -> None:
    """Repeat one task: at once while there is work, then at its interval; back off while it fails."""
    trouble = Backoff()
    while not stop.is_set():
        try:
            pause = 0.0 if await task.do() else task.every
            if trouble.since is not None:
                logger.info("%s works again after %.0f s", task.name, time.monotonic() - trouble.since)
            trouble = Backoff()
        except TrainerUnavailableError as error:
            if trouble.since is None:
                logger.warning("%s waits for the trainer, nothing is lost: %s", task.name, error)
            pause = trouble.fail(ctx.settings.worker.max_backoff)
        except Exception:  # isolation boundary: a failing task must not stop the others
            logger.exception("%s failed and is tried again; the other tasks go on", task.name)
            await _count_failure(ctx, task.name)
            pause = trouble.fail(ctx.settings.worker.max_backoff)
        await _sleep(stop, pause)


async def _sleep(stop: asyncio.Event, seconds: float) -> None:
    try:
        await asyncio.wait_for(stop.wait(), seconds)
    except TimeoutError:
        return


async def _count_failure(ctx: WorkerContext, task: str) -> None:
    def add() -> None:
        with ctx.engine.begin() as c:
            count(c, "worker_failures", task)

    try:
        await asyncio.to_thread(add)
    except Exception:  # noqa: BLE001 the store itself may be what failed; that is in the log already
        logger.warning("the failure of %s could not be counted in the store", task)


def _take_over(ctx: WorkerContext) -> None:
    """Free what workers of this machine held when they died, so that nobody waits for their leases to run out."""
    with ctx.engine.begin() as c:
        for owner in leases.holders(c):
            if leases.is_dead(owner):
                logger.info("taking over from %s, which has ended", owner)
                leases.release_all(c, owner)


def _give_back(ctx: WorkerContext) -> None:
    with ctx.engine.begin() as c:
        leases.release_all(c, ctx.owner)
