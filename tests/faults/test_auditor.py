"""The auditor finds what is planted: it is no use if it can only say that all is well."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from metaclaw_hooks.types import AdapterVersion, Sample, SampleTurn, SkillRef, Trace
from metaclaw_trainer.sample_queue import Limits, StoredQueue
from metaclaw_trainer.store import Store
from metaclaw_trainer.store import open_store as open_trainer_store
from metaclaw_trainer.versions import StoredVersions

from metaclaw_plugin.settings import Settings
from metaclaw_plugin.store import schema
from metaclaw_plugin.store.engine import open_store
from tests.faults import taken
from tests.faults.audit_training import Version, check_loaded
from tests.faults.auditor import audit_all, check_unread
from tests.faults.clients import CLOSED, Asked
from tests.faults.excuses import STOPPED, Excuse, check_failures
from tests.faults.findings import Findings
from tests.faults.stage import reward_of
from tests.faults.upstream import BASE, EOS, answer_text, ids_of, logprob_of, prompt_ids
from tests.hook_nouns import make_trace
from tests.worker_stage import fill

AGENT, NONCE, TRACE = "alpha", "1-0-1-0", "tr-1"
MESSAGES = [{"role": "user", "content": f"nonce={NONCE} What goes on, {AGENT}?"}]
TEXT = answer_text(NONCE, BASE, "0" * 12)
SAID = (*ids_of(TEXT), EOS)
LOGPROBS = tuple(logprob_of(token) for token in SAID)


@dataclass
class Kept:
    """The stores of a house in which one question was asked, answered, and put into one sample."""

    settings: Settings
    trainer_home: Path
    folder: Path
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
    trace: Trace

    def audit(self) -> dict[str, int]:
        """Kinds of what is wrong, with how often; what is in no version yet is left aside."""
        findings = Findings()
        audit_all(self.kept, self.asked, set(), findings)  # type: ignore[arg-type]
        check_failures(self.asked, [], findings)
        return {kind: len(texts) for kind, texts in findings.wrong.items() if texts}

    def sample(self, name: str, agent: str = AGENT) -> Sample:
        tokens = (*prompt_ids(MESSAGES), *SAID)
        turn = SampleTurn(TRACE, len(prompt_ids(MESSAGES)), LOGPROBS, reward_of(SAID))
        return Sample(name, agent, "s", tokens, (turn,), 0, 0)

    def train(self, name: str, number: int, agent: str = AGENT) -> None:
        queue = StoredQueue(self.trainer, "test", Limits(49152, 4096, 100, 1))
        queue.put([self.sample(name, agent)])
        taken.note(self.kept.folder, queue.claim(agent, 10))
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
    kept = Kept(Settings(home=tmp_path), tmp_path / "trainer", tmp_path)
    engine = open_store(kept.settings.store_url)
    trace = make_trace(
        id=TRACE,
        agent=AGENT,
        messages=tuple(MESSAGES),
        response={"role": "assistant", "content": TEXT},
        prompt_token_ids=tuple(prompt_ids(MESSAGES)),
        response_token_ids=SAID,
        response_logprobs=LOGPROBS,
        session="s",
    )
    fill(engine, trace)
    with engine.begin() as c:
        c.execute(sa.update(schema.traces).values(score="scored", forward="trained"))
    now = time.monotonic()
    one = Asked(NONCE, AGENT, "s", MESSAGES, True, now, now + 1, 200, True, TRACE, f"{AGENT}@v0", TEXT)
    found = House(kept, engine, open_trainer_store(f"sqlite:///{kept.trainer_home / 'queue.db'}"), [one], trace)
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


def stored(**values: Any) -> Callable[[House], None]:
    """The store holds this of the trace instead."""

    def plant(house: House) -> None:
        with house.engine.begin() as c:
            c.execute(sa.delete(schema.traces))
            c.execute(sa.delete(schema.sessions))
        fill(house.engine, replace(house.trace, **values))
        column(score="scored", forward="trained")(house)

    return plant


SHOWN = ({"role": "system", "content": "a skill of another"}, *MESSAGES)
OTHER = ({"role": "user", "content": f"nonce={NONCE} What goes on, somebody else?"},)


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
        (column(agent="beta"), {"leaked", "mixed"}),
        (column(adapter_version=3), {"mixed"}),
        (column(trainable=False, reason="cut off"), {"damaged", "mixed"}),
        (column(lease_owner="host:1:1"), {"not back"}),
        (stored(response_logprobs=(-1.0,) * len(SAID)), {"damaged", "mixed"}),
        (stored(messages=OTHER), {"damaged", "mixed"}),
        (stored(messages=SHOWN, skills=(SkillRef("a", "b", shared=False),)), {"damaged", "leaked"}),
        (lambda house: house.train("s2", 2), {"doubled", "trained twice"}),
        (lambda house: house.train("s2", 1, "beta"), {"doubled", "leaked", "mixed", "trained twice"}),
    ],
)  # fmt: skip
def test_what_is_planted_is_found(house: House, plant: Callable[[House], None], kinds: set[str]) -> None:
    plant(house)
    assert set(house.audit()) == kinds


def test_a_trace_that_no_version_learned_from_is_found(house: House) -> None:
    with house.trainer.write() as c:
        c.execute(sa.text("DELETE FROM versions"))
    assert house.audit() == {"not trained": 1}


def sample_of_another(house: House, **values: object) -> None:
    """The trainer took this in place of what was captured."""
    (house.kept.folder / taken.FILE).unlink()
    taken.note(house.kept.folder, [replace(house.sample("s1"), **values)])  # type: ignore[arg-type]


def turned(**values: object) -> Callable[[House], None]:
    def plant(house: House) -> None:
        sample_of_another(house, turns=(replace(house.sample("s1").turns[0], **values),))  # type: ignore[arg-type]

    return plant


@pytest.mark.parametrize(
    ("plant", "said"),
    [
        (lambda house: sample_of_another(house, token_ids=(5, *house.sample("s1").token_ids[1:])), "the prompt"),
        (lambda house: sample_of_another(house, token_ids=(*house.sample("s1").token_ids[:-1], 5)), "sampled tokens"),
        (lambda house: sample_of_another(house, token_ids=(*house.sample("s1").token_ids, 5)), "the end"),
        (lambda house: sample_of_another(house, adapter_version=1), "the version that spoke"),
        (lambda house: sample_of_another(house, session="another"), "its session"),
        (turned(reward=-reward_of(SAID)), "the reward"),
        (turned(logprobs=(-1.0, *LOGPROBS[1:])), "the log-probabilities"),
        (turned(trace_id="tr-9"), "there is no such trace"),
        (lambda house: (house.kept.folder / taken.FILE).write_text(""), "nobody saw it taken"),
    ],
)
def test_a_sample_that_is_not_what_was_captured_is_found(
    house: House, plant: Callable[[House], None], said: str
) -> None:
    plant(house)
    findings = Findings()
    audit_all(house.kept, house.asked, set(), findings)  # type: ignore[arg-type]
    assert [text for text in findings.wrong["mixed"] if said in text]


def test_a_held_out_trace_that_was_trained_on_is_found(house: House) -> None:
    with house.engine.begin() as c:
        c.execute(sa.update(schema.sessions).values(held_out=True))
    assert house.audit() == {"mixed": 1}


def test_a_request_that_was_begun_and_closed_by_who_was_told_to_stop_is_found(house: House) -> None:
    findings = Findings()
    one = replace(house.asked[0], whole=False, failure=CLOSED, ended=10.0)
    ending = Excuse("gateway worker told to stop", 9.0, 11.0, STOPPED, 2)
    failures = check_failures([one], [ending], findings)
    assert findings.clean
    check_unread(failures, audit_all(house.kept, [], set(), Findings()), findings)  # type: ignore[arg-type]
    assert findings.wrong["failed"]


@pytest.mark.parametrize(
    ("loaded", "kinds"),
    [
        ({"alpha@v1": "/a/v1"}, set()),
        ({}, {"not back"}),
        ({"alpha@v1": "/a/v1", "alpha@v2": "/a/v2"}, {"not back"}),
        ({"alpha@v1": "/b/v1"}, {"mixed"}),
    ],
)
def test_an_adapter_that_vllm_should_not_hold_is_found(loaded: dict[str, str], kinds: set[str]) -> None:
    versions = {("alpha", n): Version("alpha", n, "", Path(f"/a/v{n}"), (), False) for n in (1, 2)}
    findings = Findings()
    check_loaded(loaded, {"alpha@v1"}, versions, findings)
    assert {kind for kind, texts in findings.wrong.items() if texts} == kinds
