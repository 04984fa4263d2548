"""Work that a request waits for, but not for ever, and that keeps nobody else waiting while it hangs."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


class Asking:
    """A few threads of one purpose. What hangs in them, on a store that does not answer, say, hangs nothing else: the
    event loop's own threads, in which LiteLLM looks up host names, stay free."""

    def __init__(self, purpose: str, threads: int = 4) -> None:
        self._purpose = purpose
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix=f"metaclaw-{purpose}")

    async def ask(self, work: Callable[[], T], patience: float) -> T:
        """What ``work`` returns. Past the wait it is taken out of the queue, or goes on with nobody waiting for it.

        Raises:
            TimeoutError: if it took longer than ``patience`` seconds.
        """
        waiter = asyncio.wrap_future(self._pool.submit(work))
        done, _ = await asyncio.wait({waiter}, timeout=patience)
        if done:
            return waiter.result()
        waiter.cancel()
        raise TimeoutError(f"{self._purpose} took longer than {patience:g} s")
