"""The trainer's side of the seam: a folder of plain .py files changes advantages, adds losses and watches steps."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
from metaclaw_hooks.plugins import create_plugin_manager
from metaclaw_hooks.wire import AgentTraining
from metaclaw_trainer.agents import AgentBook
from metaclaw_trainer.checkpoints import read_manifest
from metaclaw_trainer.engine_thread import EngineThread
from metaclaw_trainer.loop import TrainingLoop
from metaclaw_trainer.owners import Owner
from metaclaw_trainer.sample_queue import Limits, StoredQueue
from metaclaw_trainer.settings import TrainerSettings
from metaclaw_trainer.store import open_store
from metaclaw_trainer.versions import StoredVersions

from tests.trainer.engine_parts import as_sampled, random_sample, tiny_settings


class Stage:
    """An engine, a store, and a loop that has loaded the plugins in ``hooks``."""

    def __init__(self, settings: TrainerSettings, hooks: Path) -> None:
        self.engine = EngineThread(settings)
        self.engine.start()
        self.store = open_store(settings.store_url)
        owner = Owner(self.store, settings.folder / "owners", 900)
        self.queue = StoredQueue(self.store, owner.id, Limits(49152, 4096, 1000, 2))
        self.agents = AgentBook(self.store, 2)
        versions = StoredVersions(self.store, owner.id)
        plugins = create_plugin_manager(hooks, 10.0)
        self.loop = TrainingLoop(self.engine, self.queue, versions, settings, plugins=plugins)
        self.agents.set_training("ada", AgentTraining(allowed=True))
        self.queue.put(as_sampled(self.engine, [random_sample(i, rewards=(i - 0.5,)) for i in range(2)]))

    def close(self) -> None:
        self.engine.stop()
        self.store.close()


@pytest.fixture
def stage(tiny_model: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Stage]:
    hooks = tmp_path / "hooks"
    hooks.mkdir()
    text, others = request.param
    (hooks / "own.py").write_text(textwrap.dedent(text).replace("FOLDER", str(tmp_path)))
    stage = Stage(tiny_settings(tiny_model, tmp_path, **others), hooks)
    yield stage
    stage.close()


LOSS = """
from metaclaw_trainer.losses import LossTerms

def twice(now_N, sampled_N, advantages_N, options):
    return LossTerms(-2 * advantages_N * now_N, now_N != now_N)

def register_losses():
    return {"twice": twice, "ppo": twice}
"""


@pytest.mark.parametrize(
    "stage", [(LOSS, {"loss": "twice", "normalisation": "constant", "kl_coefficient": 0.0})], indirect=True
)
def test_a_loss_of_a_plugin_trains_and_cannot_replace_a_built_in_one(stage: Stage) -> None:
    assert stage.loop.run_once()
    metrics = read_manifest(stage.loop.folder("ada", 1))["lineage"]["metrics"]
    batch = [random_sample(i, rewards=(i - 0.5,)) for i in range(2)]
    scored = as_sampled(stage.engine, batch)
    advantages = [-0.5 - 0.5 / 2, 0.5 + 0.5 / 2]
    wanted = sum(-2 * a * v for a, s in zip(advantages, scored, strict=True) for t in s.turns for v in t.logprobs)
    assert metrics["loss"] == pytest.approx(wanted, rel=1e-4)
    assert stage.engine.call(lambda e: e.losses["ppo"].__module__) == "metaclaw_trainer.losses"


@pytest.mark.parametrize(
    "stage", [("def compute_advantages(batch):\n    return [[2.0] for _ in batch]\n", {})], indirect=True
)
def test_advantages_of_a_plugin_are_trained_on(stage: Stage) -> None:
    assert stage.loop.run_once()
    metrics = read_manifest(stage.loop.folder("ada", 1))["lineage"]["metrics"]
    assert metrics["advantage_spread"] == 0.0
    assert metrics["baseline"] == pytest.approx(-2.0)  # reward 0 on average, less the advantage


WATCH = """
import json

def after_step(agent, metrics):
    with open("FOLDER/steps.jsonl", "a") as file:
        file.write(json.dumps([agent, dict(metrics)]) + chr(10))
"""


@pytest.mark.parametrize("stage", [(WATCH, {})], indirect=True)
def test_a_plugin_is_told_every_step_with_all_metrics(stage: Stage, tmp_path: Path) -> None:
    assert stage.loop.run_once()
    ((agent, metrics),) = [json.loads(line) for line in (tmp_path / "steps.jsonl").read_text().splitlines()]
    assert agent == "ada"
    wanted = {
        "reward",
        "baseline",
        "advantage_spread",
        "loss",
        "grad_norm",
        "kl_base",
        "clip_fraction",
        "entropy",
        "gap",
    }
    assert wanted | {"tokens_per_second", "learning_rate", "samples"} <= metrics.keys()


@pytest.mark.parametrize(
    "stage",
    [
        ("def compute_advantages(batch):\n    raise RuntimeError('no')\n", {}),
        ("def compute_advantages(batch):\n    return [[1.0, 2.0, 3.0]]\n", {}),
        ("def after_step(agent, metrics):\n    raise RuntimeError('no')\n", {}),
        ("def register_losses():\n    return ['no mapping']\n", {}),
    ],
    indirect=True,
)
def test_a_plugin_that_fails_is_treated_as_no_opinion(stage: Stage) -> None:
    assert stage.loop.run_once()
    assert stage.agents.status("ada").head == 1


@pytest.mark.parametrize(
    "stage",
    [("def register_losses():\n    return {'odd': lambda n, s, a, o: n.sum()}\n", {"loss": "odd"})],
    indirect=True,
)
def test_a_loss_that_gives_something_else_fails_the_step_and_says_so(stage: Stage) -> None:
    assert stage.loop.run_once()
    status = stage.agents.status("ada")
    assert (status.head, status.queued) == (0, 2)
    assert "the loss gave no LossTerms" in (status.idle_reason or "")
