"""How a store of an older release becomes one of this release.

``versions/`` holds one alembic revision for each change of ``schema.py``; ``python scripts/new_migration.py "WHAT"``
writes the next one. A test compares what they make with the schema.
"""

from __future__ import annotations

HEAD = "0001"  # the newest revision; what a store of this release is stamped with
