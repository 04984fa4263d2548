"""Stores for tests: the same tests run on SQLite and on a real PostgreSQL."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from sqlalchemy.engine import Engine

from metaclaw_plugin.store.engine import open_store
from metaclaw_plugin.store.schema import metadata
from tests.postgres_server import create_database, drop_database, running_postgres

# How long it takes to draw examples says something about the machine, and nothing about the code.
settings.register_profile("any-machine", suppress_health_check=[HealthCheck.too_slow], deadline=None)
settings.load_profile("any-machine")


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[str]:
    """URL of a PostgreSQL server, up to the database's name."""
    with running_postgres() as url:
        yield url


@pytest.fixture(params=["sqlite", "postgresql"])
def store_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """URL of an empty store, of each kind in turn."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'metaclaw.db'}"
        return
    server: str = request.getfixturevalue("postgres_server")
    name = f"t{uuid.uuid4().hex[:12]}"
    yield create_database(server, name)
    drop_database(server, name)


@pytest.fixture(scope="session")
def postgres_store(postgres_server: str) -> Iterator[Engine]:
    """One store on PostgreSQL, emptied before each test that uses it: to make one takes longer."""
    engine = open_store(create_database(postgres_server, "store"))
    yield engine
    engine.dispose()


@pytest.fixture(params=["sqlite", "postgresql"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Engine]:
    """An empty store, of each kind in turn."""
    if request.param == "postgresql":
        engine: Engine = request.getfixturevalue("postgres_store")
        names = ", ".join(table.name for table in metadata.sorted_tables)
        with engine.begin() as c:
            c.exec_driver_sql(f"TRUNCATE {names} RESTART IDENTITY")
        yield engine
        return
    engine = open_store(f"sqlite:///{tmp_path / 'metaclaw.db'}")
    yield engine
    engine.dispose()
