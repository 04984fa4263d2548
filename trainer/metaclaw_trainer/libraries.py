"""Versions of the libraries that decide what training computes."""

from __future__ import annotations

from functools import cache
from importlib.metadata import PackageNotFoundError, version

_NAMES = ("torch", "transformers", "peft", "safetensors", "metaclaw-plugin")


@cache
def library_versions() -> dict[str, str]:
    """Name -> version, of those that are installed."""
    found = {}
    for name in _NAMES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # run from a checkout
            continue
    return found
