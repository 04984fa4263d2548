"""Feedback that comes after the sample was sent: the real trainer, over HTTP, trains on what was said last."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from metaclaw_trainer.settings import TrainerSettings

from metaclaw_plugin.store.rewards import add_feedback
from metaclaw_plugin.worker.context import WorkerContext
from metaclaw_plugin.worker.corrections import correction_round
from metaclaw_plugin.worker.feedback import feedback_round
from metaclaw_plugin.worker.forwarding import Forwarder, Tracker
from metaclaw_plugin.worker.scoring import Scorer
from tests.hook_nouns import make_trace
from tests.trainer_server import serving
from tests.worker_stage import fill, rows, worker_context, worker_settings, write_hook


def settings_of(model: Path, home: Path) -> TrainerSettings:
    values: dict[str, Any] = {"base_model": str(model), "home": home, "device": "cpu", "dtype": "float32", "rank": 4}
    values |= {"nice": 0, "torch_threads": 1, "targets": ["q_proj"], "batch_size": 2, "gap_threshold": 1e9}
    return TrainerSettings.model_validate(values | {"vllm_urls": ["http://127.0.0.1:9"], "poll_interval": 0.05})


async def say(ctx: WorkerContext, trace: str, value: float) -> None:
    with ctx.engine.begin() as c:
        add_feedback(c, "alpha", trace, value, "", time.time())
    assert await feedback_round(ctx) == 1


@pytest.mark.law(3)
async def test_what_waits_is_trained_with_late_feedback_and_what_is_trained_is_left(
    tiny_model: Path, tmp_path: Path
) -> None:
    write_hook(tmp_path, "r", "def score_trace(trace): return 0.5\n")
    with (
        serving(settings_of(tiny_model, tmp_path)) as trainer,
        worker_context(worker_settings(tmp_path, rl={"remote_url": trainer.url})) as ctx,
    ):
        fill(ctx.engine, make_trace(id="t1"), make_trace(id="t2", session="s2"), closed=True)
        await Scorer(ctx).round()
        assert await Forwarder(ctx).round() == 2
        await say(ctx, "t1", -1.0)
        assert await correction_round(ctx) == 1
        assert trainer.http.post("/v1/agents/alpha/train").json()["started"]
        deadline = time.monotonic() + 60
        while trainer.http.get("/v1/agents/alpha").json()["newest"] != 1:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        status = trainer.http.get("/v1/agents/alpha").json()
        assert status["metrics"]["reward"] == pytest.approx(-0.25), "the mean of -1 and 0.5"
        assert await Tracker(ctx).round() == 2
        await say(ctx, "t2", -1.0)
        assert await correction_round(ctx) == 0
        assert rows(ctx.engine, "reward", "forward") == [(-1.0, "trained"), (-1.0, "trained")]
        assert trainer.http.get("/v1/agents/alpha").json()["trained"] == 2
