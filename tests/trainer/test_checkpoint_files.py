"""Checkpoints: whole or absent, refused when they do not fit, and never anything but safetensors and JSON."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from metaclaw_trainer.adapters import AdapterConfig, AdapterState
from metaclaw_trainer.checkpoints import (
    CONFIG,
    MANIFEST,
    OPTIMISER,
    TRAINING,
    WEIGHTS,
    Checkpoint,
    read_checkpoint,
    remove_checkpoint,
    sweep,
    write_checkpoint,
)
from metaclaw_trainer.errors import CheckpointError, CheckpointRefusedError, UnknownVersionError

SHAPE = AdapterConfig(4, 8.0, ("q_proj", "v_proj"))
NAME = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


def checkpoint() -> Checkpoint:
    torch.manual_seed(0)
    weights = {NAME: torch.randn(4, 8)}
    moments = {f"{moment}.{NAME}": torch.rand(4, 8) for moment in ("exp_avg", "exp_avg_sq")}
    return Checkpoint(AdapterState(SHAPE, weights, moments, 3), {"step": 3, "note": "é"}, {"agent": "ada", "number": 2})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "ada" / "v2", checkpoint(), "base", "f00d").path


def test_what_is_read_is_what_was_written_bit_for_bit(folder: Path) -> None:
    found, wanted = read_checkpoint(folder, "f00d", SHAPE), checkpoint()
    for ours, theirs in (
        (found.adapter.weights, wanted.adapter.weights),
        (found.adapter.moments, wanted.adapter.moments),
    ):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert (found.adapter.step, found.adapter.config) == (3, SHAPE)
    assert (found.training, found.lineage) == (wanted.training, wanted.lineage)


def test_the_folder_holds_what_vllm_loads_and_nothing_that_can_run_code(folder: Path) -> None:
    assert {path.name for path in folder.iterdir()} == {WEIGHTS, CONFIG, OPTIMISER, TRAINING, MANIFEST}
    config = json.loads((folder / CONFIG).read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 4, 8)
    assert config["target_modules"] == ["q_proj", "v_proj"]
    assert list(folder.parent.glob(".*")) == []


def test_a_checkpoint_is_never_overwritten(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="never overwritten"):
        write_checkpoint(folder, checkpoint(), "base", "f00d")


def test_another_base_model_is_refused(folder: Path) -> None:
    with pytest.raises(CheckpointRefusedError, match=r"another base model \(base, fingerprint f00d\)"):
        read_checkpoint(folder, "beef", SHAPE)


@pytest.mark.parametrize(
    "wanted",
    [AdapterConfig(8, 8.0, SHAPE.targets), AdapterConfig(4, 8.0, ("q_proj",)), AdapterConfig(4, 9.0, SHAPE.targets)],
)
def test_another_shape_is_refused(folder: Path, wanted: AdapterConfig) -> None:
    with pytest.raises(CheckpointRefusedError, match="v2 has rank 4, alpha 8, targets q_proj, v_proj, but"):
        read_checkpoint(folder, "f00d", wanted)


@pytest.mark.parametrize("name", [WEIGHTS, OPTIMISER, TRAINING, CONFIG])
def test_a_changed_or_missing_file_is_refused(folder: Path, name: str) -> None:
    data = bytearray((folder / name).read_bytes())
    data[-2] ^= 1
    (folder / name).write_bytes(bytes(data))
    with pytest.raises(CheckpointRefusedError, match=f"v2/{name} is not what was written"):
        read_checkpoint(folder, "f00d", SHAPE)
    (folder / name).unlink()
    with pytest.raises(CheckpointRefusedError, match=f"v2 has no {name}"):
        read_checkpoint(folder, "f00d", SHAPE)


@pytest.mark.parametrize("manifest", ["", "[]", "{}", '{"format": 2, "files": {}}', '{"format": 1, "files": {}}'])
def test_a_folder_from_elsewhere_is_refused(folder: Path, manifest: str) -> None:
    (folder / MANIFEST).write_text(manifest)
    with pytest.raises(CheckpointRefusedError):
        read_checkpoint(folder, "f00d", SHAPE)


@pytest.mark.law(9)
def test_a_pickle_in_the_place_of_weights_is_never_loaded(folder: Path, tmp_path: Path) -> None:
    trap = tmp_path / "ran"

    class Trap:
        def __reduce__(self):  # type: ignore[no-untyped-def]
            return (os.mkdir, (str(trap),))

    evil = pickle.dumps(Trap())
    (folder / WEIGHTS).write_bytes(evil)
    import hashlib

    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["files"][WEIGHTS]["sha256"] = hashlib.sha256(evil).hexdigest()  # an attacker can count too
    (folder / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(CheckpointRefusedError, match="cannot be read"):
        read_checkpoint(folder, "f00d", SHAPE)
    assert not trap.exists()


def test_a_missing_checkpoint_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(UnknownVersionError, match="no checkpoint at"):
        read_checkpoint(tmp_path / "v9", "f00d")


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match="No space left on device"):
        write_checkpoint(tmp_path / "ada" / "v1", checkpoint(), "base", "f00d")
    assert list((tmp_path / "ada").iterdir()) == []


def test_what_a_killed_writer_left_is_swept_and_checkpoints_stay(folder: Path) -> None:
    shutil.copytree(folder, folder.parent / ".v3.0123abcd")
    assert sweep(folder.parent) == 1
    assert [path.name for path in folder.parent.iterdir()] == ["v2"]
    assert sweep(folder.parent / "nowhere") == 0


def test_a_removed_checkpoint_is_gone_and_removing_it_again_is_no_error(folder: Path) -> None:
    remove_checkpoint(folder)
    remove_checkpoint(folder)
    assert list(folder.parent.iterdir()) == []


def test_equal_adapters_are_equal_files(tmp_path: Path) -> None:
    one, two = (write_checkpoint(tmp_path / name, checkpoint(), "base", "f00d") for name in ("a", "b"))
    assert one.sha256 == two.sha256
    for name in (WEIGHTS, OPTIMISER, TRAINING, CONFIG, MANIFEST):
        assert (one.path / name).read_bytes() == (two.path / name).read_bytes()
