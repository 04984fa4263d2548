"""SIGKILL of worker and trainer at random moments: every trace is trained, and once."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.law(3)
def test_every_trace_is_scored_forwarded_and_trained_once_whoever_is_killed(tiny_model: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.faults.killed_worker", str(tiny_model), str(tmp_path)]
    command += ["--kills", "6", "--seed", "11"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert sum(result["kills"].values()) == 6
    assert result["traces"] == result["expected"]
    assert result["wrong"] == {}
    assert set(result["samples"]) == {"trained"}
    assert result["leases_left"] == 0
