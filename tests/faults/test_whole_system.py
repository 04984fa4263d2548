"""A short, seeded siege of the whole system; ``make faults`` is the long one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.points import GATEWAY_POINTS, POINTS, TRAINER_POINTS, WORKER_POINTS
from tests.faults.scripted import FAULTS

ROOT = Path(__file__).resolve().parents[2]
CHOSEN = {"worker-trainer: cut in the request", "vllm forgets every adapter", "store locked for 1 s"}
SEED = os.environ.get("METACLAW_TEST_SEED", "20261122")


@pytest.mark.gateway
@pytest.mark.law(3)
@pytest.mark.law(4)
@pytest.mark.law(5)
def test_laws_3_4_and_5_hold_while_processes_are_killed_and_things_break(tiny_model: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    faults = ",".join(str(place) for place, fault in enumerate(FAULTS, 1) if fault.name in CHOSEN)
    command = [sys.executable, "-m", "tests.faults", "--kills", "6", "--vllm-kills", "1", "--faults", faults]
    command += ["--seed", SEED, "--folder", str(tmp_path / "house"), "--json", str(report)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert report.exists(), done.stderr[-3000:]
    found = json.loads(report.read_text())
    assert found["clean"], done.stdout[-4000:]
    assert sum(found["kills"].values()) == 7
    assert {row["name"] for row in found["faults"] if row["touched"]} == CHOSEN
    assert (
        found["whole"] + sum(found["failed_by"].values())
        == found["requests"]
        == found["whole"] + len(found["failures"])
    )
    assert found["seen"]["answers compared"] > 20
    assert found["seen"]["traces trained once"] > 20
    assert found["seen"]["samples compared token by token"] > 5


def test_every_wire_is_broken_in_every_way() -> None:
    wires = ("gateway-vllm", "worker-trainer", "trainer-vllm", "worker-vllm")
    ways = ("refused", "slow", "silent", "cut in the answer", "cut in the request")
    assert {f"{wire}: {way}" for wire in wires for way in ways} <= {fault.name for fault in FAULTS}


def test_every_point_is_in_one_process_and_has_a_place() -> None:
    assert sorted((*GATEWAY_POINTS, *WORKER_POINTS, *TRAINER_POINTS)) == sorted(POINTS)
    assert {name.split(".")[0] for name in POINTS} == {
        "commit", "score", "forward", "queue", "train", "checkpoint", "publish"
    }  # fmt: skip
