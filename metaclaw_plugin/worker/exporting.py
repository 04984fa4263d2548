"""A version as a plain PEFT folder that others can load."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path

from metaclaw_hooks.types import AdapterVersion

from metaclaw_plugin.errors import ExportError

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
MANIFEST = "manifest.json"  # ours; PEFT passes over it


def export_version(version: AdapterVersion, folder: Path) -> None:
    """Copy weights, configuration and manifest of ``version`` to the new folder ``folder``, whole or not at all.

    Raises:
        ExportError: if the folder exists, or the files are not on this machine, damaged, or cannot be written.
    """
    source = Path(version.path)
    if folder.exists():
        raise ExportError(f"{folder} exists already; name a new folder")
    if not (source / WEIGHTS).is_file():
        raise ExportError(f"{version.name} is not at {source} on this machine; run the command where the trainer runs")
    with (source / WEIGHTS).open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if digest != version.sha256:
        raise ExportError(f"{source / WEIGHTS} is damaged: its sha256 is {digest[:12]}, not {version.sha256[:12]}")
    partial = folder.with_name(folder.name + ".partial")
    manifest = dataclasses.asdict(version) | {"state": str(version.state), "trace_ids": list(version.trace_ids)}
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for name in (WEIGHTS, CONFIG):
            shutil.copyfile(source / name, partial / name)
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=2), encoding="utf-8")
        partial.rename(folder)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise ExportError(f"{version.name} could not be written to {folder}: {error.strerror}") from error
