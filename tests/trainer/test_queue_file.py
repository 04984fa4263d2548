"""The trainer's queue while its file is away: nothing is acknowledged that could not be found again."""

from __future__ import annotations

from pathlib import Path

import pytest
import sqlalchemy as sa
from metaclaw_trainer.agents import AgentBook
from metaclaw_trainer.errors import StoreError
from metaclaw_trainer.sample_queue import Limits, StoredQueue
from metaclaw_trainer.store import open_store

from tests.trainer.engine_parts import random_sample

LIMITS = Limits(vocabulary=49152, max_tokens=4096, max_queued=100, batch_size=4)


@pytest.mark.law(3)
def test_a_sample_is_refused_while_the_file_is_away_and_taken_when_it_is_back(tmp_path: Path) -> None:
    folder = tmp_path / "trainer"
    store = open_store(f"sqlite:///{folder / 'queue.db'}")
    queue = StoredQueue(store, "test", LIMITS)
    assert queue.put([random_sample(1)]).accepted == ["s1"]
    folder.rename(tmp_path / "elsewhere")
    for _ in range(2):
        with pytest.raises(StoreError, match="is gone; put it back"):
            queue.put([random_sample(2)])
        assert not folder.exists(), "an empty queue would take the place of the lost one"
    (tmp_path / "elsewhere").rename(folder)
    reply = queue.put([random_sample(1), random_sample(2)])
    assert (reply.duplicate, reply.accepted) == (["s1"], ["s2"])
    assert [status.queued for status in AgentBook(store, 4).statuses()] == [2]
    store.close()


def test_a_restored_queue_is_read_in_the_place_of_the_old_one(tmp_path: Path) -> None:
    store, other = (open_store(f"sqlite:///{tmp_path / name}.db") for name in ("queue", "backup"))
    StoredQueue(other, "test", LIMITS).put([random_sample(7)])
    other.close()
    for part in tmp_path.glob("queue.db*"):
        part.unlink()
    (tmp_path / "backup.db").rename(tmp_path / "queue.db")
    with store.read() as c:
        assert c.scalar(sa.text("SELECT id FROM samples")) == "s7"
    store.close()
