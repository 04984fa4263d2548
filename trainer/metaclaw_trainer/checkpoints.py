"""Checkpoints: folders that appear whole or not at all, and are refused when they are not what was written.

    adapter_model.safetensors, adapter_config.json    PEFT's format: vLLM loads the folder
    optimizer.safetensors                             AdamW's moments, by the adapter's tensor names
    training.json                                     step, baseline, random state, samples seen
    manifest.json                                     lineage, and sha256 and size of every other file

A folder is written beside its place under a name that starts with a dot, every file is fsynced, the manifest comes
last, and one rename puts it in place. Only safetensors and JSON are ever read; nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from metaclaw_trainer.adapters import AdapterConfig, AdapterState
from metaclaw_trainer.errors import CheckpointError, CheckpointRefusedError, UnknownVersionError

FORMAT = 1
WEIGHTS, CONFIG, OPTIMISER, TRAINING, MANIFEST = (
    "adapter_model.safetensors",
    "adapter_config.json",
    "optimizer.safetensors",
    "training.json",
    "manifest.json",
)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What is written and read."""

    adapter: AdapterState
    training: Mapping[str, Any]  # JSON: what the owner of the adapter needs besides
    lineage: Mapping[str, Any] = field(default_factory=dict)  # JSON: agent, number, parent, trace ids, metrics ...


@dataclass(frozen=True, slots=True)
class Written:
    """Where a checkpoint lies."""

    path: Path
    sha256: str  # of adapter_model.safetensors


def write_checkpoint(target: Path, checkpoint: Checkpoint, base_model: str, fingerprint: str) -> Written:
    """Write ``target``, a folder that must not exist.

    Raises:
        CheckpointError: if it exists or cannot be written; nothing of it is left then.
    """
    if target.exists():
        raise CheckpointError(f"{target} exists already: a checkpoint is never overwritten")
    fresh = target.parent / f".{target.name}.{uuid.uuid4().hex}"
    try:
        fresh.mkdir(parents=True, mode=0o700)
        digests = {name: _write(fresh / name, data) for name, data in _files(checkpoint, base_model).items()}
        config = checkpoint.adapter.config
        manifest = {
            "format": FORMAT,
            "base_model": base_model,
            "base_fingerprint": fingerprint,
            **config.to_json(),
            "step": checkpoint.adapter.step,
            "lineage": dict(checkpoint.lineage),
            "files": digests,
        }
        _write(fresh / MANIFEST, _json(manifest))
        _sync_folder(fresh)
        fresh.rename(target)
        _sync_folder(target.parent)
    except OSError as error:
        shutil.rmtree(fresh, ignore_errors=True)
        raise CheckpointError(
            f"cannot write the checkpoint {target}: {error.strerror or error}; is the disk full?"
        ) from error
    return Written(target, digests[WEIGHTS]["sha256"])


def read_checkpoint(folder: Path, fingerprint: str, config: AdapterConfig | None = None) -> Checkpoint:
    """Read what ``write_checkpoint`` wrote; ``config``: the only shape of adapter that is welcome.

    Raises:
        UnknownVersionError: if there is no such folder.
        CheckpointRefusedError: if it belongs to another base model, has another shape, or is not what was written.
    """
    if not folder.is_dir():
        raise UnknownVersionError(f"no checkpoint at {folder}")
    manifest = read_manifest(folder)
    found = _config_of(folder, manifest)
    if manifest.get("base_fingerprint") != fingerprint:
        raise CheckpointRefusedError(
            f"{folder.name} was trained on another base model ({manifest.get('base_model')}, fingerprint "
            f"{manifest.get('base_fingerprint')}) than the one that is loaded (fingerprint {fingerprint})"
        )
    if config is not None and found != config:
        raise CheckpointRefusedError(
            f"{folder.name} has {_shape(found)}, but the settings ask for {_shape(config)}: "
            "set metaclaw.trainer back, or start again from the base model (head 0)"
        )
    data = {name: _verified(folder, name, manifest["files"]) for name in (WEIGHTS, OPTIMISER, TRAINING, CONFIG)}
    try:
        state = AdapterState(found, load(data[WEIGHTS]), load(data[OPTIMISER]), int(manifest["step"]))
        return Checkpoint(state, json.loads(data[TRAINING]), manifest["lineage"])
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise CheckpointRefusedError(f"{folder.name} cannot be read: {error}") from error


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest, its format checked.

    Raises:
        CheckpointRefusedError: if there is none, or it is of another format.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointRefusedError(
            f"{folder.name} has no readable {MANIFEST}: it is no checkpoint of this trainer"
        ) from error
    if (
        not isinstance(manifest, dict)
        or manifest.get("format") != FORMAT
        or not isinstance(manifest.get("files"), dict)
    ):
        raise CheckpointRefusedError(
            f"{folder.name}: {MANIFEST} is not of format {FORMAT}: it was written by something else"
        )
    return manifest


def remove_checkpoint(folder: Path) -> None:
    """Remove a checkpoint; first under another name, so that no half of it is ever seen in its place."""
    if not folder.exists():
        return
    gone = folder.parent / f".{folder.name}.{uuid.uuid4().hex}"
    folder.rename(gone)
    shutil.rmtree(gone)


def sweep(parent: Path) -> int:
    """Remove what writers that were killed left behind under ``parent``; how many folders."""
    left = [path for path in parent.glob(".*.*") if path.is_dir()] if parent.is_dir() else []
    for path in left:
        shutil.rmtree(path)
    return len(left)


def _files(checkpoint: Checkpoint, base_model: str) -> dict[str, bytes]:
    adapter = checkpoint.adapter
    peft = adapter.config.to_peft(base_model).to_dict() | {"inference_mode": True}
    return {
        WEIGHTS: _tensors(adapter.weights),
        CONFIG: _json(peft),
        OPTIMISER: _tensors(adapter.moments),
        TRAINING: _json(dict(checkpoint.training)),
    }


def _tensors(tensors: Mapping[str, torch.Tensor]) -> bytes:
    return save({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata={"format": "pt"})


def _json(data: Mapping[str, Any]) -> bytes:
    return (json.dumps(data, indent=1, sort_keys=True, default=_listed, allow_nan=False) + "\n").encode()


def _listed(value: object) -> Sequence[Any] | str:
    return sorted(value) if isinstance(value, set | frozenset) else str(value)


def _write(path: Path, data: bytes) -> dict[str, Any]:
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _verified(folder: Path, name: str, digests: Mapping[str, Any]) -> bytes:
    try:
        data = (folder / name).read_bytes()
        expected = digests[name]["sha256"]
    except (OSError, KeyError, TypeError) as error:
        raise CheckpointRefusedError(f"{folder.name} has no {name}, or its manifest does not know it") from error
    if hashlib.sha256(data).hexdigest() != expected:
        raise CheckpointRefusedError(
            f"{folder.name}/{name} is not what was written (sha256 differs): it is damaged or changed"
        )
    return data


def _config_of(folder: Path, manifest: Mapping[str, Any]) -> AdapterConfig:
    try:
        return AdapterConfig(int(manifest["rank"]), float(manifest["alpha"]), tuple(sorted(manifest["targets"])))
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointRefusedError(f"{folder.name}: {MANIFEST} does not say rank, alpha and targets") from error


def _shape(config: AdapterConfig) -> str:
    return f"rank {config.rank}, alpha {config.alpha:g}, targets {', '.join(config.targets)}"
