"""Revisions that bring an older store of the trainer to this release; one for each change of ``schema.py``."""

from __future__ import annotations

HEAD = "0001"  # the newest revision, which a store of this release is stamped with
