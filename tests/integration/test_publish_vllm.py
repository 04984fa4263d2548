"""Publishing and judging on a real vLLM, with the trainer's own list of versions and its reconciler."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from metaclaw_hooks.plugins import Plugins, create_plugin_manager
from metaclaw_hooks.types import Agent, Kind, Mode, Sampling, Trace
from sqlalchemy.engine import Engine

from benchmarks.publish_versions import Scorer
from benchmarks.telltale import TelltaleMaker
from metaclaw_plugin.gateway.current import CURRENT, CurrentRequest, Plan
from metaclaw_plugin.gateway.healing import HealingTransport
from metaclaw_plugin.gateway.routing import InFlight, Route
from metaclaw_plugin.settings import PublishSettings, Settings, VllmSettings
from metaclaw_plugin.store import adapters as store
from metaclaw_plugin.store.agents import add_agent
from metaclaw_plugin.store.engine import open_store
from metaclaw_plugin.store.schema import sessions
from metaclaw_plugin.store.traces import insert_traces
from metaclaw_plugin.store.wishes import promote, rollback
from metaclaw_plugin.worker.evaluation import Evaluator
from metaclaw_plugin.worker.publishing import Publisher
from metaclaw_plugin.worker.sampling import Sampler
from metaclaw_plugin.worker.verdicts import decide
from tests.publish_trainer import LocalTrainer
from tests.vllm_server import VllmProcess

pytestmark = pytest.mark.vllm

SHORT = "def score_trace(trace):\n    return 1.0 if len(trace.response_text) < 40 else -1.0\n"


@dataclass
class Stage:
    settings: Settings
    engine: Engine
    trainer: LocalTrainer
    plugins: Plugins
    http: httpx.AsyncClient
    maker: TelltaleMaker
    agent: str


@pytest.fixture
def agent(request: pytest.FixtureRequest) -> str:
    """Each test has an agent of its own: the vLLM is shared by the whole run."""
    return f"p-{abs(hash(request.node.nodeid)) % 10**8}-{int(time.time())}"


@pytest.fixture
async def stage(tmp_path: Path, tiny_vllm: VllmProcess, agent: str) -> AsyncIterator[Stage]:
    settings = Settings(
        home=tmp_path,
        publish=PublishSettings(retry_interval=0.01, replays=6, replay_max_tokens=12),
        vllm=VllmSettings(url=tiny_vllm.url),
    )
    engine = open_store(settings.store_url)
    with engine.begin() as c:
        add_agent(c, agent)
    folder = tmp_path / "trainer"
    folder.mkdir()
    (tmp_path / "hooks").mkdir()
    (tmp_path / "hooks" / "short.py").write_text(SHORT, encoding="utf-8")
    plugins = create_plugin_manager(tmp_path / "hooks", packages=False)
    async with httpx.AsyncClient(trust_env=False) as http:
        trainer = LocalTrainer(folder, tiny_vllm.url)
        yield Stage(settings, engine, trainer, plugins, http, TelltaleMaker(tiny_vllm.model, folder / "made"), agent)
        await trainer.set_served([])
    plugins.close()
    engine.dispose()


@pytest.fixture
def always(stage: Stage) -> Iterator[Stage]:
    """The same without a gate."""
    policy = stage.settings.publish.model_copy(update={"policy": "always"})
    stage.settings = stage.settings.model_copy(update={"publish": policy})
    return stage


def a_trace(agent: str, number: int) -> Trace:
    return Trace(
        id=f"{agent}-{number}",
        request_id=f"r{number}",
        agent=agent,
        session=f"{agent}-s",
        turn=number,
        exchange=number,
        kind=Kind.MAIN,
        route="chat",
        model="metaclaw-base",
        adapter_version=0,
        messages=({"role": "user", "content": f"Question {number}: what is a river?"},),
        tools=(),
        response={"role": "assistant", "content": "Water that flows."},
        finish_reason="stop",
        prompt_token_ids=None,
        response_token_ids=None,
        response_logprobs=None,
        sampling=Sampling(temperature=1.0, top_p=1.0),
        skills=(),
        skill_generation=0,
        chat_template_hash=None,
        response_id=None,
        started_at=1.0,
        first_token_at=1.0,
        finished_at=1.0,
        trainable=False,
        reason="test",
    )


def hold_out(stage: Stage, count: int) -> None:
    row = {
        "id": f"{stage.agent}-s",
        "agent": stage.agent,
        "evidence": "x-session-id",
        "evidence_key": "k",
        "started_at": 1.0,
        "last_at": 1.0,
        "held_out": True,
        "without_skills": [],
    }
    with stage.engine.begin() as c:
        c.execute(sessions.insert().values(**row))
        insert_traces(c, [a_trace(stage.agent, number) for number in range(count)])


async def say(stage: Stage, model: str) -> str:
    body = {"model": model, "messages": [{"role": "user", "content": "Speak."}], "max_tokens": 8, "temperature": 0}
    answer = await stage.http.post(f"{stage.settings.vllm.url}/v1/chat/completions", json=body, timeout=60)
    answer.raise_for_status()
    return str(answer.json()["choices"][0]["message"]["content"])


async def loaded(stage: Stage) -> set[str]:
    models = (await stage.http.get(f"{stage.settings.vllm.url}/v1/models")).json()["data"]
    return {model["id"] for model in models if model["id"].startswith(f"{stage.agent}@")}


async def rounds(publisher: Publisher, count: int) -> None:
    for _ in range(count):
        await publisher.round()
        await asyncio.sleep(0.02)


async def test_what_was_sampled_is_scored_alike_by_the_same_model(stage: Stage) -> None:
    sampler = Sampler(stage.http, stage.settings.vllm.url)
    reply = await sampler.reply("metaclaw-base", a_trace(stage.agent, 0), 12, seed=1)
    ids = (*reply.prompt_token_ids, *reply.token_ids)
    again = await sampler.logprobs("metaclaw-base", ids, len(reply.prompt_token_ids))
    assert again == pytest.approx(list(reply.logprobs), abs=0.02)
    talk = [*a_trace(stage.agent, 0).messages, {"role": "assistant", "content": "Water."}]
    mean = await sampler.conversation_logprob("metaclaw-base", talk)
    assert -15.0 < mean < 0.0


@pytest.mark.law(6)
async def test_law_6_versions_follow_each_other_and_each_speaks_for_itself(always: Stage) -> None:
    publisher = Publisher(always)
    for number in (1, 2, 3):
        telltale = always.maker.make(f"v{number}")
        always.trainer.commit(always.agent, telltale)
        await publisher.round()
        with always.engine.connect() as c:
            assert store.get_route(c, always.agent).version == number
        assert telltale.speaks(await say(always, f"{always.agent}@v{number}"))
        assert await loaded(always) == {f"{always.agent}@v{number}"}


def cut_off(folder: Path) -> None:
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:200])


def of_a_rank_too_high(folder: Path) -> None:
    config = folder / "adapter_config.json"
    config.write_text(config.read_text().replace('"r": 16', '"r": 512'), encoding="utf-8")


@pytest.mark.parametrize("damage", [cut_off, of_a_rank_too_high])
async def test_an_adapter_that_cannot_be_loaded_never_serves_and_the_reason_is_shown(
    always: Stage, damage: Callable[[Path], None]
) -> None:
    publisher = Publisher(always)
    good = always.maker.make("v1")
    always.trainer.commit(always.agent, good)
    await publisher.round()
    bad = always.maker.make("v2")
    damage(bad.path)
    always.trainer.commit(always.agent, bad)
    await rounds(publisher, 2)
    with always.engine.connect() as c:
        assert store.get_route(c, always.agent).version == 1
        assert store.get_version(c, always.agent, 2).problem
    assert await loaded(always) == {f"{always.agent}@v1"}
    assert good.speaks(await say(always, f"{always.agent}@v1"))


async def test_what_vllm_scores_otherwise_than_the_trainer_never_serves(always: Stage) -> None:
    """The trainer's side is transformers and two products a layer: neither its code nor vLLM's is trusted here."""
    publisher, scorer = Publisher(always), Scorer(always.maker.model)
    good, other = always.maker.make("v1"), always.maker.make("v2")
    always.trainer.commit(always.agent, good, scorer.proof("s1", good.path))
    await publisher.round()
    with always.engine.connect() as c:
        assert store.get_route(c, always.agent).version == 1
    always.trainer.commit(always.agent, other, scorer.proof("s2", good.path))  # as if other weights had been written
    await rounds(publisher, 2)
    with always.engine.connect() as c:
        assert store.get_route(c, always.agent).version == 1
        assert f"disagree about {always.agent}@v2" in str(store.get_version(c, always.agent, 2).problem)
    assert await loaded(always) == {f"{always.agent}@v1"}
    assert good.speaks(await say(always, f"{always.agent}@v1"))


async def test_a_babbling_candidate_is_held_back_forced_in_and_taken_back(stage: Stage) -> None:
    """It earns a better reward (it is short), and the gate sees through it; the owner has the last word, both ways."""
    hold_out(stage, 6)
    publisher = Publisher(stage)
    babble = stage.maker.make("v1")
    stage.trainer.commit(stage.agent, babble)
    for _ in range(400):
        await rounds(publisher, 1)
        with stage.engine.connect() as c:
            record = store.get_version(c, stage.agent, 1)
        if record.decision is not None:
            break
        await asyncio.sleep(0.1)
    assert record.decision is not None
    assert (str(record.version.state), record.decision["accepted"]) == ("rejected", False)
    assert record.decision["judged_by"] == ["short"]
    assert record.decision["kl"] > 1.0
    assert "nats per token away from the base model" in record.decision["sentence"]
    with stage.engine.begin() as c:
        promote(c, stage.agent, 1)
    await rounds(publisher, 2)
    assert babble.speaks(await say(stage, f"{stage.agent}@v1"))
    with stage.engine.begin() as c:
        assert store.get_route(c, stage.agent).version == 1
        rollback(c, stage.agent)
    await rounds(publisher, 3)
    assert await loaded(stage) == set()
    assert stage.trainer.heads[-1] == (stage.agent, 0)


async def test_a_candidate_like_the_base_model_passes_the_gate(stage: Stage) -> None:
    """An evaluation of the base model against itself: no difference, no distance."""
    hold_out(stage, 6)
    version = stage.trainer  # the version is only named: its weights are the base model's
    telltale = stage.maker.make("v1", loudness=0.0)
    version.commit(stage.agent, telltale)
    [body] = await stage.trainer.versions(0)
    await stage.trainer.set_served([f"{stage.agent}@v1"])
    evaluation = await Evaluator(stage).evaluate(body.version(), 0, stage.settings.publish)
    assert evaluation.kl == pytest.approx(0.0, abs=0.02)
    assert evaluation.difference is not None
    assert evaluation.difference.mean == 0.0
    assert evaluation.sanity is not None
    assert evaluation.sanity[0] == pytest.approx(evaluation.sanity[1], abs=0.01)
    assert decide(1, evaluation, PublishSettings()).accepted
    assert not decide(1, evaluation, PublishSettings(policy="better")).accepted


@pytest.mark.law(5)
async def test_law_5_an_adapter_that_vllm_lost_is_back_before_the_request_fails(always: Stage) -> None:
    publisher, counted = Publisher(always), []
    telltale = always.maker.make("v1")
    always.trainer.commit(always.agent, telltale)
    await publisher.round()
    name = f"{always.agent}@v1"
    await always.http.post(f"{always.settings.vllm.url}/v1/unload_lora_adapter", json={"lora_name": name})
    assert await loaded(always) == set()
    current = CurrentRequest("chat", {})
    current.plan = Plan("tr", Agent(always.agent, Mode.RL), Route(f"metaclaw/{name}", 1), None, None)
    CURRENT.set(current)
    transport = HealingTransport(
        httpx.AsyncHTTPTransport(),
        always.engine,
        InFlight(always.engine, "p1"),
        lambda what, agent, n: counted.append(what),
    )
    healed = dataclasses.replace(always, http=httpx.AsyncClient(transport=transport))
    spoken = await asyncio.gather(*(say(healed, name) for _ in range(4)))
    assert all(telltale.speaks(text) for text in spoken)
    assert "adapters_reloaded" in counted
    assert current.plan.route.adapter_version == 1


@pytest.mark.law(4)
async def test_law_4_the_base_model_and_every_version_keep_their_own_voice_in_one_batch(stage: Stage) -> None:
    """More adapters than vLLM has slots, all asked at once together with the base model."""
    url = stage.settings.vllm.url
    alone = await say(stage, "metaclaw-base")
    voices = {f"{stage.agent}-{number}@v1": stage.maker.make(f"m{number}") for number in range(6)}
    try:
        for name, voice in voices.items():
            body = {"lora_name": name, "lora_path": str(voice.path)}
            (await stage.http.post(f"{url}/v1/load_lora_adapter", json=body, timeout=60)).raise_for_status()
        for _ in range(3):
            spoken = await asyncio.gather(*(say(stage, name) for name in voices), say(stage, "metaclaw-base"))
            for (name, voice), text in zip(voices.items(), spoken, strict=False):
                assert voice.speaks(text), f"{name} said {text!r}"
            assert spoken[-1] == alone
    finally:
        for name in voices:
            await stage.http.post(f"{url}/v1/unload_lora_adapter", json={"lora_name": name}, timeout=60)
