"""Agents and their keys, on both databases."""

from __future__ import annotations

import pytest
import sqlalchemy as sa
from metaclaw_hooks.errors import InvalidNameError
from metaclaw_hooks.types import Mode
from sqlalchemy.engine import Engine

from metaclaw_plugin.errors import AgentExistsError, UnknownAgentError, UnknownKeyError
from metaclaw_plugin.store import agents, schema
from metaclaw_plugin.store.deletion import delete_traces
from metaclaw_plugin.store.traces import TraceFilter, insert_traces
from tests.store_cases import a_trace


def test_agent_is_added_once(store: Engine) -> None:
    with store.begin() as c:
        added = agents.add_agent(c, "alpha", Mode.AUTO)
        assert agents.get_record(c, "alpha") == added
        assert (added.mode, added.skill_generation, added.record, added.owner) == (Mode.AUTO, 0, True, None)
        with pytest.raises(AgentExistsError):
            agents.add_agent(c, "alpha")


@pytest.mark.parametrize("name", ["", "Alpha", "-a", "a/b", "..", "a" * 64, "a\n", "ä"])
@pytest.mark.law(9)
def test_law_9_a_name_that_is_no_slug_makes_no_agent(store: Engine, name: str) -> None:
    with store.begin() as c:
        with pytest.raises(InvalidNameError):
            agents.add_agent(c, name)
        assert agents.list_agents(c) == []


def test_mode_falls_back_to_the_global_one(store: Engine) -> None:
    with store.begin() as c:
        agents.add_agent(c, "alpha")
        assert agents.get_agent(c, "alpha", Mode.SKILLS_ONLY).mode is Mode.SKILLS_ONLY
        agents.set_mode(c, "alpha", Mode.OFF)
        assert agents.get_agent(c, "alpha", Mode.SKILLS_ONLY).mode is Mode.OFF
        agents.set_mode(c, "alpha", None)
        assert agents.get_agent(c, "alpha", Mode.RL).mode is Mode.RL


def test_unknown_agent_is_named_everywhere(store: Engine) -> None:
    with store.begin() as c:
        for call in (
            lambda: agents.get_record(c, "nobody"),
            lambda: agents.set_mode(c, "nobody", None),
            lambda: agents.raise_generation(c, "nobody"),
            lambda: agents.remove_agent(c, "nobody"),
            lambda: agents.new_key(c, ["nobody"]),
            lambda: agents.new_key(c, []),
        ):
            with pytest.raises(UnknownAgentError):
                call()


def test_generation_rises_by_one(store: Engine) -> None:
    with store.begin() as c:
        agents.add_agent(c, "alpha")
        assert [agents.raise_generation(c, "alpha") for _ in range(3)] == [1, 2, 3]


def test_settings_and_recording_are_kept(store: Engine) -> None:
    with store.begin() as c:
        agents.add_agent(c, "alpha")
        agents.set_settings(c, "alpha", {"publish": {"policy": "better"}})
        agents.set_record(c, "alpha", False)
    with store.connect() as c:
        record = agents.get_record(c, "alpha")
    assert record.settings == {"publish": {"policy": "better"}}
    assert record.record is False


def test_key_acts_for_its_agents_in_order(store: Engine) -> None:
    with store.begin() as c:
        for name in ("alpha", "beta", "gamma"):
            agents.add_agent(c, name)
        key = agents.new_key(c, ["gamma", "alpha", "gamma"])
    with store.connect() as c:
        found = agents.agents_of_key(c, key.secret)
    assert found == agents.KeyIdentity(key.id, ("gamma", "alpha"))


def test_secret_is_long_and_not_in_the_store(store: Engine) -> None:
    with store.begin() as c:
        agents.add_agent(c, "alpha")
        keys = [agents.new_key(c, ["alpha"]) for _ in range(3)]
        dump = str([tuple(row) for table in schema.metadata.sorted_tables for row in c.execute(sa.select(table))])
    assert len({key.secret for key in keys}) == 3
    for key in keys:
        assert key.secret.startswith("mc-")
        assert len(key.secret) >= 3 + 43
        assert key.secret not in dump
        assert key.secret[3:20] not in dump


@pytest.mark.parametrize("secret", ["", "mc-", "x" * 10_000, "mc-\ud800", "' OR 1=1 --"])
def test_unknown_key_is_nobody(store: Engine, secret: str) -> None:
    with store.begin() as c:
        agents.add_agent(c, "alpha")
        agents.new_key(c, ["alpha"])
        assert agents.agents_of_key(c, secret) is None


def test_revoked_and_rotated_keys_are_refused(store: Engine) -> None:
    with store.begin() as c:
        agents.add_agent(c, "alpha")
        agents.add_agent(c, "beta")
        first, second = agents.new_key(c, ["alpha"]), agents.new_key(c, ["beta", "alpha"])
        agents.revoke_key(c, first.id)
        assert agents.agents_of_key(c, first.secret) is None
        third = agents.rotate_key(c, second.id)
        assert agents.agents_of_key(c, second.secret) is None
        assert agents.agents_of_key(c, third.secret) == agents.KeyIdentity(third.id, ("beta", "alpha"))
        assert [key.id for key in agents.list_keys(c, "alpha")] == [third.id]
        for gone in (first.id, second.id, "nosuch"):
            with pytest.raises(UnknownKeyError):
                agents.rotate_key(c, gone)
        with pytest.raises(UnknownKeyError):
            agents.revoke_key(c, "nosuch")


@pytest.mark.law(4)
def test_law_4_a_removed_agent_takes_its_own_keys_along_and_leaves_the_others(store: Engine) -> None:
    with store.begin() as c:
        for name in ("alpha", "beta"):
            agents.add_agent(c, name)
        own, shared = agents.new_key(c, ["alpha"]), agents.new_key(c, ["alpha", "beta"])
        assert agents.remove_agent(c, "alpha") == 1
        assert agents.agents_of_key(c, own.secret) is None
        assert agents.agents_of_key(c, shared.secret) == agents.KeyIdentity(shared.id, ("beta",))
        agents.add_agent(c, "alpha")
        assert agents.agents_of_key(c, own.secret) is None


@pytest.mark.law(4)
def test_law_4_first_claimer_owns_and_others_are_refused(store: Engine) -> None:
    with store.begin() as c:
        assert agents.claim_agent(c, "alpha", "team:a")
        assert agents.claim_agent(c, "alpha", "team:a")
        assert not agents.claim_agent(c, "alpha", "team:b")
        agents.set_owner(c, "alpha", "team:b")
        assert agents.claim_agent(c, "alpha", "team:b")
        assert not agents.claim_agent(c, "alpha", "team:a")


@pytest.mark.law(4)
def test_law_4_an_agent_with_keys_of_ours_cannot_be_claimed(store: Engine) -> None:
    with store.begin() as c:
        agents.add_agent(c, "alpha")
        key = agents.new_key(c, ["alpha"])
        assert not agents.claim_agent(c, "alpha", "user:eve")
        agents.revoke_key(c, key.id)
        assert agents.claim_agent(c, "alpha", "user:ann")


@pytest.mark.law(4)
def test_law_4_whoever_claims_the_name_of_a_removed_agent_does_not_inherit_its_traces(store: Engine) -> None:
    with store.begin() as c:
        assert agents.claim_agent(c, "alpha", "team:red")
        insert_traces(c, [a_trace()])
        agents.remove_agent(c, "alpha")
        for owner in ("team:blue", "team:red"):
            assert not agents.claim_agent(c, "alpha", owner)
        agents.add_agent(c, "alpha", owner="team:blue")
        assert agents.claim_agent(c, "alpha", "team:blue")
        agents.remove_agent(c, "alpha")
        delete_traces(c, TraceFilter(agent="alpha"))
        assert agents.claim_agent(c, "alpha", "team:red")
