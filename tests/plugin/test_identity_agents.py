"""Key -> agents: what a key and its headers may choose, and what not."""

from __future__ import annotations

import asyncio
import stat
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.engine import Engine
from sqlalchemy.exc import OperationalError

from metaclaw_plugin.errors import ForbiddenAgentError, StoreError
from metaclaw_plugin.gateway import keys as keys_module
from metaclaw_plugin.gateway.identity import (
    Identity,
    KeyFacts,
    choose_agent,
    identify,
    internal_key,
    own_models,
)
from metaclaw_plugin.gateway.keys import FRESH, STALE, KeyCache
from metaclaw_plugin.store import agents

POOL = Identity(("alpha", "beta"))


def virtual(alias: str | None = None, **given: Any) -> KeyFacts:
    return KeyFacts(ours=False, metadata=given.pop("metadata", {}), alias=alias, **({"user_id": "ann"} | given))


def ours(*names: str, **claim: Any) -> KeyFacts:
    return KeyFacts(ours=True, metadata={"metaclaw": {"agents": list(names), **claim}})


def test_key_of_ours_acts_for_what_authentication_found(store: Engine) -> None:
    with store.begin() as c:
        assert identify(c, ours("alpha", "beta")) == POOL
        assert identify(c, ours(internal=True)).internal
        assert identify(c, KeyFacts(ours=True, metadata={})) == Identity()
        assert agents.list_agents(c) == []


@pytest.mark.law(4)
def test_law_4_metadata_of_a_virtual_key_cannot_pose_as_our_authentication(store: Engine) -> None:
    forged = {"metaclaw": {"agents": ["alpha"], "internal": True}}
    with store.begin() as c:
        assert identify(c, virtual(metadata=forged)) == Identity()
    assert not KeyFacts.of(SimpleNamespace(metadata=forged)).ours
    assert KeyFacts.of(SimpleNamespace(metadata=forged, authenticated_by_custom_auth=True)).ours


def test_virtual_key_names_its_agent_by_metadata_and_else_by_alias(store: Engine) -> None:
    with store.begin() as c:
        assert identify(c, virtual("beta", metadata={"agent_id": "alpha"})).agents == ("alpha",)
        assert identify(c, virtual("gamma")).agents == ("gamma",)
        assert identify(c, virtual("x", metadata={"agent_id": ["delta", "eps", 3, "No Slug"]})).agents == (
            "delta",
            "eps",
        )
        assert [record.owner for record in agents.list_agents(c)] == ["user:ann"] * 4


@pytest.mark.parametrize("key", [virtual(), virtual("My Key"), virtual("../x"), virtual(metadata={"agent_id": 7})])
def test_virtual_key_without_an_agent_passes_through(store: Engine, key: KeyFacts) -> None:
    with store.begin() as c:
        identity = identify(c, key)
        assert identity == Identity()
        assert choose_agent(identity, {}) is None
        assert agents.list_agents(c) == []


@pytest.mark.law(4)
def test_law_4_an_agent_belongs_to_the_team_or_user_that_claimed_it_first(store: Engine) -> None:
    with store.begin() as c:
        assert identify(c, virtual("alpha", team_id="red")).agents == ("alpha",)
        assert identify(c, virtual("alpha", team_id="red", user_id="bob")).agents == ("alpha",)
        for stranger in (virtual("alpha", team_id="blue"), virtual("alpha"), virtual("alpha", user_id=None, token="t")):
            refused = identify(c, stranger)
            assert (refused.agents, refused.refused) == ((), ("alpha",))
            with pytest.raises(ForbiddenAgentError, match="belongs to another owner"):
                choose_agent(refused, {})
        agents.set_owner(c, "alpha", "team:blue")
        assert identify(c, virtual("alpha", team_id="blue")).agents == ("alpha",)


def test_first_agent_when_nothing_chooses() -> None:
    assert choose_agent(POOL, {}, "openclaw") == "alpha"
    assert choose_agent(POOL, {"x-agent-id": ""}, None) == "alpha"
    assert choose_agent(POOL, {"x-agent-id": " beta "}) == "beta"
    assert choose_agent(POOL, {}, "metaclaw/beta") == "beta"
    assert choose_agent(POOL, {"x-agent-id": "beta"}, "metaclaw/beta") == "beta"


@pytest.mark.parametrize(
    ("identity", "headers", "model"),
    [
        (POOL, {"x-agent-id": "gamma"}, None),
        (POOL, {"x-agent-id": "ALPHA"}, None),
        (POOL, {"x-agent-id": "alpha"}, "metaclaw/gamma"),
        (POOL, {"x-agent-id": "alpha"}, "metaclaw/beta"),
        (POOL, {}, "metaclaw/gamma"),
        (POOL, {}, "metaclaw/alpha@v3"),
        (POOL, {}, "metaclaw/metaclaw-base"),
        (Identity(), {"x-agent-id": "alpha"}, None),
        (Identity(), {}, "metaclaw/alpha"),
    ],
)
@pytest.mark.law(4)
def test_law_4_headers_and_model_never_widen_a_key(
    identity: Identity, headers: dict[str, str], model: str | None
) -> None:
    with pytest.raises(ForbiddenAgentError):
        choose_agent(identity, headers, model)


def test_internal_calls_are_nobodys() -> None:
    assert choose_agent(Identity(internal=True), {"x-agent-id": "alpha"}, "metaclaw/alpha@v3") is None


def test_own_models() -> None:
    assert own_models(POOL) == ["metaclaw/alpha", "metaclaw/beta"]


def test_internal_key_is_made_once_and_for_its_owner_alone(tmp_path: Path) -> None:
    home = tmp_path / "home"
    key = internal_key(home)
    assert internal_key(home) == key
    assert len(key) > 40
    assert stat.S_IMODE((home / "internal.key").stat().st_mode) == 0o600
    assert [path.name for path in home.iterdir()] == ["internal.key"]


def test_internal_key_that_cannot_be_kept_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "home").write_text("a file")
    with pytest.raises(StoreError, match="internal key"):
        internal_key(tmp_path / "home")


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


async def test_key_is_remembered_for_seconds_and_a_revoked_one_soon_refused(store: Engine) -> None:
    clock = Clock()
    cache = KeyCache(store, 5.0, clock)
    with store.begin() as c:
        agents.add_agent(c, "alpha")
        key = agents.new_key(c, ["alpha"])
    known = agents.KeyIdentity(key.id, ("alpha",))
    assert await cache.look_up(key.secret) == known
    with store.begin() as c:
        agents.revoke_key(c, key.id)
    clock.now = FRESH - 0.1
    assert await cache.look_up(key.secret) == known
    clock.now = FRESH
    assert await cache.look_up(key.secret) is None
    assert await cache.look_up("mc-unknown") is None


@pytest.mark.law(5)
async def test_law_5_known_keys_go_on_while_the_store_does_not_answer(store: Engine) -> None:
    clock = Clock()
    engine = sa.create_engine(store.url)
    failing: list[bool] = []

    @sa.event.listens_for(engine, "before_cursor_execute")
    def fail(*_: object) -> None:
        if failing:
            raise OperationalError("select", {}, RuntimeError("disk gone"))

    cache = KeyCache(engine, 5.0, clock)
    with store.begin() as c:
        agents.add_agent(c, "alpha")
        key = agents.new_key(c, ["alpha"])
    known = await cache.look_up(key.secret)
    failing.append(True)
    clock.now = STALE - 1
    assert await cache.look_up(key.secret) == known
    with pytest.raises(OperationalError):
        await cache.look_up("mc-unknown")
    clock.now = STALE + 1
    with pytest.raises(OperationalError):
        await cache.look_up(key.secret)
    engine.dispose()


@pytest.mark.law(5)
async def test_law_5_a_store_that_hangs_is_not_waited_for_without_end(store: Engine) -> None:
    clock, answers = Clock(), threading.Event()
    engine = sa.create_engine(store.url)

    @sa.event.listens_for(engine, "before_cursor_execute")
    def hang(*_: object) -> None:
        answers.wait(30)

    with store.begin() as c:
        agents.add_agent(c, "alpha")
        key, other = agents.new_key(c, ["alpha"]), agents.new_key(c, ["alpha"])
    cache = KeyCache(engine, 0.2, clock)
    before = sum(thread.name.startswith("metaclaw-keys") for thread in threading.enumerate())
    answers.set()
    known = await cache.look_up(key.secret)
    answers.clear()
    clock.now = FRESH
    started = time.monotonic()
    assert await cache.look_up(key.secret) == known, "after one wait"
    for _ in range(20):
        assert await cache.look_up(key.secret) == known, "without any"
    strangers = await asyncio.gather(*(cache.look_up(f"mc-{n}") for n in range(20)), return_exceptions=True)
    assert {type(found) for found in strangers} == {TimeoutError}
    assert time.monotonic() - started < 5
    assert sum(thread.name.startswith("metaclaw-keys") for thread in threading.enumerate()) - before <= 4
    answers.set()
    clock.now = 2 * FRESH + 1
    assert await cache.look_up(other.secret) == agents.KeyIdentity(other.id, ("alpha",))
    engine.dispose()


async def test_remembered_keys_are_bounded(store: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys_module, "_CACHED", 2)
    cache = KeyCache(store, 5.0, Clock())
    with store.begin() as c:
        agents.add_agent(c, "alpha")
        made = [agents.new_key(c, ["alpha"]) for _ in range(3)]
    for key in made:
        await cache.look_up(key.secret)
    with store.begin() as c:
        for key in made:
            agents.revoke_key(c, key.id)
    remembered = {key.id for key in reversed(made) if await cache.look_up(key.secret) is not None}
    assert remembered == {made[1].id, made[2].id}
