"""A version as a plain PEFT folder that others can load."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import tarfile
import tempfile
from collections.abc import Mapping
from pathlib import Path

from metaclaw_hooks.types import AdapterVersion
from metaclaw_hooks.wire import ADAPTER_FILES, ADAPTER_WEIGHTS

from metaclaw_plugin.adapter_files import fetch_adapter
from metaclaw_plugin.errors import ExportError

MANIFEST = "manifest.json"  # ours; PEFT passes over it


def export_version(version: AdapterVersion, folder: Path, trainer: str, headers: Mapping[str, str]) -> None:
    """Copy weights, configuration and manifest of ``version`` to the new folder ``folder``, whole or not at all.

    Files that are not on this machine come from the trainer at the URL ``trainer``; ``headers`` carry its key.

    Raises:
        ExportError: if the folder exists, or the files are damaged or cannot be written.
        AdapterFilesError: if they are not on this machine and could not be fetched.
    """
    if folder.exists():
        raise ExportError(f"{folder} exists already; name a new folder")
    source = Path(version.path)
    if (source / ADAPTER_WEIGHTS).is_file():
        _write(version, source, folder)
        return
    with tempfile.TemporaryDirectory(dir=_existing(folder.absolute().parent)) as temporary:
        fetched = Path(temporary) / "adapter"
        fetch_adapter(trainer, headers, version.name, fetched)
        _write(version, fetched, folder)


def export_archive(version: AdapterVersion, folder: Path, trainer: str, headers: Mapping[str, str]) -> Path:
    """The same as a tar file in ``folder``, which must exist; it holds one folder, named as the version is.

    Raises:
        ExportError: if the files are damaged or cannot be written.
        AdapterFilesError: if they are not on this machine and could not be fetched.
    """
    export_version(version, folder / version.name, trainer, headers)
    archive = folder / f"{version.name}.tar"
    try:
        with tarfile.open(archive, "w") as tar:
            tar.add(folder / version.name, version.name)
    except OSError as error:
        raise ExportError(f"{version.name} could not be packed into {archive}: {error.strerror}") from error
    return archive


def _existing(folder: Path) -> Path:
    """``folder``, or the nearest one above that is there: the disk that the export goes to."""
    return next(one for one in (folder, *folder.parents) if one.is_dir())


def _write(version: AdapterVersion, source: Path, folder: Path) -> None:
    weights = source / ADAPTER_WEIGHTS
    with weights.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if digest != version.sha256:
        raise ExportError(f"{weights} is damaged: its sha256 is {digest[:12]}, not {version.sha256[:12]}")
    partial = folder.with_name(folder.name + ".partial")
    manifest = dataclasses.asdict(version) | {"state": str(version.state), "trace_ids": list(version.trace_ids)}
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for name in ADAPTER_FILES:
            shutil.copyfile(source / name, partial / name)
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=2), encoding="utf-8")
        partial.rename(folder)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise ExportError(f"{version.name} could not be written to {folder}: {error.strerror}") from error
