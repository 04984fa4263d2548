"""The auditor finds what is planted: it is no use if it can only say that all is well."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import sqlalchemy as sa
from metaclaw_hooks.types import AdapterVersion, Sample, SampleTurn
from metaclaw_trainer.sample_queue import Limits, StoredQueue
from metaclaw_trainer.store import Store
from metaclaw_trainer.store import open_store as open_trainer_store
from metaclaw_trainer.versions import StoredVersions

from metaclaw_plugin.settings import Settings
from metaclaw_plugin.store import schema
from metaclaw_plugin.store.engine import open_store
from tests.faults.auditor import audit_all, check_failures
from tests.faults.clients import Asked
from tests.faults.findings import Findings
from tests.faults.upstream import BASE, EOS, answer_text, ids_of, prompt_ids
from tests.hook_nouns import make_trace
from tests.worker_stage import fill

AGENT, NONCE, TRACE = "alpha", "1-0-1-0", "tr-1"
MESSAGES = [{"role": "user", "content": f"nonce={NONCE} What goes on, {AGENT}?"}]
TEXT = answer_text(NONCE, BASE, "0" * 12)


@dataclass
class Kept:
    """The stores of a house in which one question was asked, answered, and put into one sample."""

    settings: Settings
    trainer_home: Path
    real_vllm: bool = False

    @property
    def store_file(self) -> Path:
        return self.settings.home / "metaclaw.db"


@dataclass
class House:
    kept: Kept
    engine: sa.Engine
    trainer: Store
    asked: list[Asked]

    def audit(self) -> dict[str, int]:
        """Kinds of what is wrong, with how often; what is in no version yet is left aside."""
        findings = Findings()
        audit_all(self.kept, self.asked, set(), findings)  # type: ignore[arg-type]
        check_failures(self.asked, [], findings)
        return {kind: len(texts) for kind, texts in findings.wrong.items() if texts}

    def sample(self, name: str, agent: str = AGENT) -> Sample:
        tokens = (*prompt_ids(MESSAGES), *ids_of(TEXT), EOS)
        turn = SampleTurn(TRACE, len(prompt_ids(MESSAGES)), (-10.8,) * (len(ids_of(TEXT)) + 1), 1.0)
        return Sample(name, agent, "s", tokens, (turn,), 0, 0)

    def train(self, name: str, number: int, agent: str = AGENT) -> None:
        queue = StoredQueue(self.trainer, "test", Limits(49152, 4096, 100, 1))
        queue.put([self.sample(name, agent)])
        queue.claim(agent, 10)
        head = StoredVersions(self.trainer, "test").head(agent)
        folder = self.kept.trainer_home / "adapters" / agent / f"v{number}"
        version = AdapterVersion(
            agent, number, "tiny", number - 1, (TRACE,), number, {}, "0" * 64, {}, str(folder), 1.0
        )
        assert StoredVersions(self.trainer, "test").commit(version, [name], head.generation)
        with self.trainer.write() as c:
            c.execute(sa.text("UPDATE versions SET removed_at = 1"))  # its files are none of this test's business


@pytest.fixture
def house(tmp_path: Path) -> House:
    kept = Kept(Settings(home=tmp_path), tmp_path / "trainer")
    engine = open_store(kept.settings.store_url)
    trace = make_trace(
        id=TRACE,
        agent=AGENT,
        messages=tuple(MESSAGES),
        response={"role": "assistant", "content": TEXT},
        prompt_token_ids=tuple(prompt_ids(MESSAGES)),
        response_token_ids=(*ids_of(TEXT), EOS),
        response_logprobs=(-10.8,) * (len(ids_of(TEXT)) + 1),
    )
    fill(engine, trace)
    with engine.begin() as c:
        c.execute(sa.update(schema.traces).values(score="scored", forward="trained"))
    now = time.monotonic()
    one = Asked(NONCE, AGENT, "s", MESSAGES, True, now, now + 1, 200, True, TRACE, f"{AGENT}@v0", TEXT)
    found = House(kept, engine, open_trainer_store(f"sqlite:///{kept.trainer_home / 'queue.db'}"), [one])
    found.train("s1", 1)
    return found


def test_a_house_in_order_is_found_in_order(house: House) -> None:
    assert house.audit() == {}


def change(**values: object) -> Callable[[House], None]:
    def plant(house: House) -> None:
        house.asked = [replace(house.asked[0], **values)]  # type: ignore[arg-type]

    return plant


def column(**values: object) -> Callable[[House], None]:
    def plant(house: House) -> None:
        with house.engine.begin() as c:
            c.execute(sa.update(schema.traces).values(**values))

    return plant


def double(house: House) -> None:
    fill(house.engine, make_trace(id="tr-2", agent=AGENT, messages=tuple(MESSAGES), trainable=False))


@pytest.mark.parametrize(
    ("plant", "kinds"),
    [
        (change(trace="tr-other"), {"lost"}),
        (double, {"doubled"}),
        (change(text=f"{TEXT} and more"), {"damaged", "mixed"}),
        (change(text=answer_text("1-9-9-9", BASE, "0" * 12)), {"damaged", "leaked", "mixed"}),
        (change(text=answer_text(NONCE, "beta@v3", "0" * 12)), {"damaged", "leaked", "mixed"}),
        (change(version=f"{AGENT}@v1"), {"mixed"}),
        (change(version="beta@v0"), {"leaked"}),
        (change(whole=False, error="gone"), {"failed"}),
        (column(agent="beta"), {"leaked"}),
        (column(adapter_version=3), {"mixed"}),
        (column(trainable=False, reason="cut off"), {"damaged", "mixed"}),
        (column(lease_owner="host:1:1"), {"not back"}),
        (lambda house: house.train("s2", 2), {"doubled", "trained twice"}),
        (lambda house: house.train("s2", 1, "beta"), {"doubled", "leaked", "trained twice"}),
    ],
)  # fmt: skip
def test_what_is_planted_is_found(house: House, plant: Callable[[House], None], kinds: set[str]) -> None:
    plant(house)
    assert set(house.audit()) == kinds


def test_a_trace_that_no_version_learned_from_is_found(house: House) -> None:
    with house.trainer.write() as c:
        c.execute(sa.text("DELETE FROM versions"))
    assert house.audit() == {"not trained": 1}
