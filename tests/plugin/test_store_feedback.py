"""Feedback that matches nothing does not stand in the way of the rest."""

from __future__ import annotations

import pytest
from sqlalchemy.engine import Engine

from metaclaw_plugin.store.rewards import add_feedback, open_feedback
from metaclaw_plugin.store.traces import insert_traces
from tests.store_cases import a_trace


@pytest.mark.law(4)
def test_law_4_one_agents_stray_feedback_holds_up_nobody(store: Engine) -> None:
    with store.begin() as c:
        insert_traces(c, [a_trace(), a_trace(id="tr-b", agent="beta", response_id="resp-b")])
        for n in range(20):
            add_feedback(c, "alpha", f"stray-{n}", 1.0, "", float(n))
        add_feedback(c, "alpha", "tr-b", 1.0, "", 30.0)  # another agent's
        add_feedback(c, "beta", "resp-b", 1.0, "", 31.0)
        add_feedback(c, "alpha", "tr-0", 1.0, "", 32.0)
        assert [item.target for item in open_feedback(c, 5, waited_since=-1.0)] == ["resp-b", "tr-0"]
        assert [item.target for item in open_feedback(c, 3, waited_since=1.0)] == ["stray-0", "stray-1", "resp-b"]
