"""A trainer that is killed with SIGKILL in any phase of a step goes on as if nothing had been."""

from __future__ import annotations

import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from metaclaw_trainer.checkpoints import OPTIMISER, TRAINING, WEIGHTS, read_manifest

from tests.trainer.killed_trainer import BATCH, BATCHES, PHASES

KILLED = [phase for phase in PHASES if phase != "none"]


@pytest.fixture(scope="module")
def homes(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, int]]:
    """The folder of all homes, and the signal that ended the first process of each."""
    folder = tmp_path_factory.mktemp("killed")
    command = [sys.executable, "-m", "tests.trainer.killed_trainer", str(tiny_model), str(folder)]
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, {line.split()[0]: int(line.split()[1]) for line in done.stdout.splitlines()}


@pytest.mark.law(3)
@pytest.mark.parametrize("phase", KILLED)
def test_a_kill_in_any_phase_leaves_training_bit_identical(homes: tuple[Path, dict[str, int]], phase: str) -> None:
    folder, ended = homes
    assert ended[phase] == signal.SIGKILL
    assert ended["none"] == 0
    for number in range(1, BATCHES + 1):
        whole, resumed = (folder / name / "trainer" / "adapters" / "ada" / f"v{number}" for name in ("none", phase))
        for name in (WEIGHTS, OPTIMISER, TRAINING):
            assert (whole / name).read_bytes() == (resumed / name).read_bytes(), (number, name)


@pytest.mark.law(3)
@pytest.mark.parametrize("phase", KILLED)
def test_a_kill_in_any_phase_trains_every_sample_exactly_once(homes: tuple[Path, dict[str, int]], phase: str) -> None:
    home = homes[0] / phase / "trainer"
    trained = [
        sample
        for number in range(1, BATCHES + 1)
        for sample in read_manifest(home / "adapters" / "ada" / f"v{number}")["lineage"]["sample_ids"]
    ]
    assert sorted(trained) == sorted(f"s{seed}" for seed in range(BATCHES * BATCH))
    with sqlite3.connect(home / "queue.db") as store:
        assert store.execute("select count(*), min(state), max(state) from samples").fetchone() == (
            BATCHES * BATCH, "trained", "trained",
        )  # fmt: skip
        assert store.execute("select count(*) from versions").fetchone() == (BATCHES,)
    assert sorted(path.name for path in (home / "adapters" / "ada").iterdir()) == ["v1", "v2", "v3"]
