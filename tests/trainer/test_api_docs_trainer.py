"""docs/trainer.md names every route of the trainer, and no other."""

from __future__ import annotations

import re
from pathlib import Path

from metaclaw_trainer.api import agents, fork, health, hooks, samples, sampling, versions

DOCS = Path(__file__).parents[2] / "docs" / "trainer.md"


def test_the_page_names_every_route_and_no_other() -> None:
    text = DOCS.read_text(encoding="utf-8")
    named = {re.sub(r"AGENT|SESSION|NAME|FILE", "*", path) for path in re.findall(r"/v1/[A-Za-z_/]+|/metrics", text)}
    routers = (agents, fork, health, hooks, samples, sampling, versions)
    real = {re.sub(r"\{[a-z_]+\}", "*", route.path) for room in routers for route in room.router.routes}
    assert named == real


def test_the_page_names_every_status_that_errors_are_answered_with() -> None:
    from metaclaw_trainer.api.replies import _STATUS

    rows = re.findall(r"^\| ([0-9, ]+) \|", DOCS.read_text(encoding="utf-8"), flags=re.MULTILINE)
    documented = {int(status) for row in rows for status in row.split(", ")}
    assert {status for _, status, _ in _STATUS} - {500} | {401, 403, 413} == documented
