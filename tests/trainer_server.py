"""A whole trainer over real HTTP, in a thread of the test process."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import httpx
import uvicorn
from metaclaw_trainer.app import create_app
from metaclaw_trainer.process import running
from metaclaw_trainer.services import Services
from metaclaw_trainer.settings import TrainerSettings


@dataclass(frozen=True)
class TrainerServer:
    """A running trainer."""

    services: Services
    url: str
    http: httpx.Client  # with this trainer as base, without a key


@contextmanager
def serving(settings: TrainerSettings, port: int = 0) -> Iterator[TrainerServer]:
    """Start it on ``port`` of 127.0.0.1 (0: a free one), stop it when the block ends."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", port))
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    with running(settings) as services:
        config = uvicorn.Config(create_app(services), log_config=None, timeout_graceful_shutdown=1)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        with httpx.Client(base_url=url, timeout=60, trust_env=False) as client:
            yield TrainerServer(services, url, client)
        server.should_exit = True
        thread.join(30)
