"""A store whose file is removed, moved or replaced while processes have it open."""

from __future__ import annotations

from pathlib import Path

import pytest
import sqlalchemy as sa
from sqlalchemy.exc import OperationalError

from metaclaw_plugin.store.agents import add_agent, list_agents
from metaclaw_plugin.store.engine import open_store


def names(engine: sa.Engine) -> list[str]:
    with engine.connect() as c:
        return [agent.name for agent in list_agents(c)]


@pytest.mark.law(3)
def test_nothing_is_written_to_a_file_that_was_removed(tmp_path: Path) -> None:
    file = tmp_path / "metaclaw.db"
    engine = open_store(f"sqlite:///{file}")
    with engine.begin() as c:
        add_agent(c, "alpha")
    for part in tmp_path.glob("metaclaw.db*"):
        part.unlink()
    for _ in range(2):
        with pytest.raises(OperationalError, match=r"metaclaw\.db is gone; put it back, or restore"), engine.begin():
            pytest.fail("a transaction began on a file that nobody can open again")
        assert not file.exists(), "an empty store would take the place of the lost one"
    engine.dispose()


@pytest.mark.law(5)
def test_a_store_that_was_away_goes_on_where_it_was(tmp_path: Path) -> None:
    file = tmp_path / "home" / "metaclaw.db"
    engine = open_store(f"sqlite:///{file}")
    with engine.begin() as c:
        add_agent(c, "alpha")
    file.parent.rename(tmp_path / "elsewhere")
    with pytest.raises(OperationalError), engine.connect():
        pass
    (tmp_path / "elsewhere").rename(file.parent)
    with engine.begin() as c:
        add_agent(c, "beta")
    assert names(engine) == ["alpha", "beta"]
    engine.dispose()


def test_a_backup_that_is_put_in_its_place_is_what_is_read_and_written(tmp_path: Path) -> None:
    engine, other = open_store(f"sqlite:///{tmp_path / 'metaclaw.db'}"), open_store(f"sqlite:///{tmp_path / 'b.db'}")
    with engine.begin() as c:
        add_agent(c, "alpha")
    with other.begin() as c:
        add_agent(c, "restored")
    other.dispose()
    assert names(engine) == ["alpha"]
    for part in tmp_path.glob("metaclaw.db*"):
        part.unlink()
    (tmp_path / "b.db").rename(tmp_path / "metaclaw.db")
    with engine.begin() as c:
        add_agent(c, "zeta")
    assert names(engine) == ["restored", "zeta"]
    engine.dispose()
