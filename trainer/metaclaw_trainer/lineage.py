"""Which versions learned from which traces, as their manifests say."""

from __future__ import annotations

from collections.abc import Collection

import sqlalchemy as sa

from metaclaw_trainer.schema import versions


def learned_from(c: sa.Connection, traces: Collection[str]) -> set[tuple[str, int]]:
    """Versions (agent, number) that were trained on one of ``traces``. Reads every manifest."""
    if not traces:
        return set()
    wanted = set(traces)
    rows = c.execute(sa.select(versions.c.agent, versions.c.number, versions.c.manifest))
    return {(row.agent, row.number) for row in rows if not wanted.isdisjoint(row.manifest["trace_ids"])}


def with_descendants(c: sa.Connection, trained: Collection[tuple[str, int]]) -> set[tuple[str, int]]:
    """Versions that were trained from a version that learned from a trace have learned from it too."""
    reached = set(trained)
    for agent in {agent for agent, _ in trained}:
        query = sa.select(versions.c.number, versions.c.manifest).where(versions.c.agent == agent)
        for number, manifest in c.execute(query.order_by(versions.c.number)).all():
            if (agent, manifest.get("parent")) in reached:
                reached.add((agent, number))
    return reached
