"""The task in which a gateway process tells the store what it is doing, about once a second and never in a request."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping

from sqlalchemy.exc import SQLAlchemyError

logger = logging.getLogger(__name__)

HEARTBEAT = 1.0  # seconds between two writes


async def beat(writers: Mapping[str, Callable[[], None]], interval: float = HEARTBEAT) -> None:
    """Call all ``writers`` (what is written -> how) every ``interval`` seconds until cancelled, and once more then."""
    try:
        while True:
            await asyncio.sleep(interval)
            await asyncio.to_thread(_write, writers)
    finally:
        _write(writers)


def _write(writers: Mapping[str, Callable[[], None]]) -> None:
    for what, write in writers.items():
        try:
            write()
        except SQLAlchemyError as error:
            logger.warning("%s could not be written to the store: %s", what, type(error).__name__)
