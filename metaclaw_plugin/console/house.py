"""What every page works with: settings, the store, the skill library."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from fastapi import Request
from sqlalchemy.engine import Connection, Engine

from metaclaw_plugin.console.glance import Glance
from metaclaw_plugin.console.shared import Shared
from metaclaw_plugin.console.tokens import Tokens
from metaclaw_plugin.doctor.finding import Finding
from metaclaw_plugin.settings import Settings
from metaclaw_plugin.skills.library import Library
from metaclaw_plugin.skills.opening import open_library
from metaclaw_plugin.store.engine import open_store


@dataclass
class House:
    """One console's means. The store is opened when it is first asked, so that pages can say that it is away."""

    settings: Settings
    config: Path | None
    key: str
    salt_key: str | None = None  # of LiteLLM, from the environment
    examined: tuple[float | None, tuple[Finding, ...]] = (None, ())  # when the doctor was asked last, and what it said
    live: Shared[str] = field(init=False)  # the overview's table, by where its page starts
    _engine: Engine | None = None
    _library: Library | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self.glance = Glance(self.settings)
        self.tokens = Tokens(self.settings.base_model)
        self.closing = threading.Event()

    @property
    def engine(self) -> Engine:
        """The store.

        Raises:
            StoreError: if it cannot be opened.
        """
        with self._lock:
            if self._engine is None:
                self._engine = open_store(self.settings.store_url)
            return self._engine

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """A connection that only reads."""
        with self.engine.connect() as c:
            yield c

    @contextmanager
    def writing(self) -> Iterator[Connection]:
        """A transaction that writes."""
        with self.engine.begin() as c:
            yield c

    @property
    def library(self) -> Library:
        """The skills as they lie on disk now."""
        with self._lock:
            if self._library is None:
                self._library = open_library(self.settings)
                return self._library
        self._library.refresh()
        return self._library

    def close(self) -> None:
        """End what is live, and give the store's connections back."""
        self.closing.set()
        if self._engine is not None:
            self._engine.dispose()


def house_of(request: Request) -> House:
    """The house of the application that got ``request``."""
    house: House = request.app.state.house
    return house
