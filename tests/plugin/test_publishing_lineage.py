"""Deleted traces, and the versions that had learned from them."""

from __future__ import annotations

from pathlib import Path

import pytest
import sqlalchemy as sa
from metaclaw_hooks.types import VersionState
from sqlalchemy.engine import Engine

from metaclaw_plugin.store import adapters as store
from metaclaw_plugin.store.engine import open_store
from metaclaw_plugin.store.lineage import learned_from_deleted, retrain_without_deleted
from metaclaw_plugin.store.schema import recalls
from tests.publishing_cases import version_body


@pytest.fixture
def engine(tmp_path: Path) -> Engine:
    """v1 <- v2 <- v3 <- v4 (candidate); each was trained on the trace of its number."""
    engine = open_store(f"sqlite:///{tmp_path / 'metaclaw.db'}")
    with engine.begin() as c:
        for number in (1, 2, 3, 4):
            store.record_candidate(c, version_body(number, parent=number - 1))
            if number < 4:
                store.set_state(c, "ada", number, VersionState.SERVING, {"accepted": True, "sentence": "good"})
                store.set_route(c, "ada", number)
        store.set_state(c, "ada", 1, VersionState.RETIRED)
    return engine


def delete(c: sa.Connection, trace: str, agent: str = "ada") -> None:
    c.execute(recalls.insert().values(trace_id=trace, agent=agent, at=1.0))


def test_a_version_learns_from_all_that_its_ancestors_learned_from(engine: Engine) -> None:
    with engine.begin() as c:
        assert learned_from_deleted(c, "ada") == []
        delete(c, "t3")
        assert learned_from_deleted(c, "ada") == [3, 4]
        delete(c, "t1")
        assert learned_from_deleted(c, "ada") == [1, 2, 3, 4]


def test_retraining_goes_back_to_the_last_version_that_did_not_learn_from_them(engine: Engine) -> None:
    with engine.begin() as c:
        delete(c, "t3")
        said = retrain_without_deleted(c, "ada")
        assert said == "v3, v4 learned from deleted traces; training goes on from v2; ada@v2 serves now"
        assert (store.get_route(c, "ada").version, store.get_route(c, "ada").head) == (2, 2)
        assert store.get_version(c, "ada", 3).wish == store.WISH_WITHDRAW
        assert store.get_version(c, "ada", 4).version.state is VersionState.REJECTED


def test_when_all_have_learned_from_them_the_base_model_serves(engine: Engine) -> None:
    with engine.begin() as c:
        delete(c, "t1")
        assert "training goes on from the base model" in retrain_without_deleted(c, "ada")
        assert (store.get_route(c, "ada").version, store.get_route(c, "ada").head) == (0, 0)


def test_what_serves_stays_when_only_a_candidate_has_learned_from_them(engine: Engine) -> None:
    with engine.begin() as c:
        delete(c, "t4")
        assert "what serves has not learned from them" in retrain_without_deleted(c, "ada")
        assert (store.get_route(c, "ada").version, store.get_route(c, "ada").head) == (3, 3)
        assert store.get_version(c, "ada", 4).version.state is VersionState.REJECTED


@pytest.mark.law(4)
def test_law_4_another_agents_deletion_changes_nothing(engine: Engine) -> None:
    with engine.begin() as c:
        delete(c, "t3", agent="bob")
        assert "nothing is to be done" in retrain_without_deleted(c, "ada")
        assert store.get_route(c, "ada").version == 3
