"""How long a real PostgreSQL may keep a process of ours waiting."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from metaclaw_plugin.errors import StoreError
from metaclaw_plugin.store.engine import open_store
from metaclaw_plugin.store.upgrade import bring_up_to_date
from tests.postgres_server import create_database, drop_database, frozen, running_postgres


@pytest.fixture
def url(postgres_server: str) -> Iterator[str]:
    name = f"t{uuid.uuid4().hex[:12]}"
    yield create_database(postgres_server, name)
    drop_database(postgres_server, name)


def options(engine: Engine) -> dict[str, Any]:
    with engine.connect() as c:
        driver: Any = c.connection.dbapi_connection
        return dict(driver.info.get_parameters())


def test_a_server_that_vanishes_is_soon_known_for_it_unless_the_url_says_otherwise(url: str) -> None:
    ours, owners = open_store(url), open_store(f"{url}?connect_timeout=60&tcp_user_timeout=0")
    assert (options(ours)["connect_timeout"], options(ours)["tcp_user_timeout"]) == ("5", "15000")
    assert (options(owners)["connect_timeout"], options(owners)["tcp_user_timeout"]) == ("60", "0")
    assert options(owners)["keepalives_idle"] == "5"
    for engine in (ours, owners):
        engine.dispose()


def test_statements_end_in_time_where_requests_wait_and_nowhere_else(url: str) -> None:
    waited, patient = open_store(url, statement_timeout=0.2), open_store(url)
    with waited.connect() as c, pytest.raises(sa.exc.OperationalError, match="statement timeout"):
        c.execute(sa.text("SELECT pg_sleep(5)"))
    with patient.connect() as c:
        assert c.execute(sa.text("SHOW statement_timeout")).scalar() == "0"
    for engine in (waited, patient):
        engine.dispose()


def test_an_upgrade_takes_as_long_as_it_takes(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def slowly(c: Connection) -> None:
        c.execute(sa.text("SELECT pg_sleep(1)"))
        bring_up_to_date(c)

    monkeypatch.setattr("metaclaw_plugin.store.engine.bring_up_to_date", slowly)
    engine = open_store(url, statement_timeout=0.5)
    with engine.connect() as c:
        assert c.execute(sa.text("SHOW statement_timeout")).scalar() == "500ms"
    engine.dispose()


def test_a_server_that_hangs_lets_nobody_wait_for_a_connection_without_end() -> None:
    with running_postgres() as server:
        url = create_database(server, "metaclaw") + "?connect_timeout=2"
        with frozen(server):
            started = time.monotonic()
            with pytest.raises(StoreError):
                open_store(url)
            assert time.monotonic() - started < 15
        open_store(url).dispose()
