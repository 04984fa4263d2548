"""Python source, read."""

from __future__ import annotations

import ast


def parsed(*arguments: str) -> ast.Module:
    """``ast.parse``, again when another thread parsed meanwhile: CPython 3.11 mixes up their depths (gh-106905)."""
    for _ in range(5):
        try:
            return ast.parse(*arguments)
        except SystemError:
            continue
    return ast.parse(*arguments)
