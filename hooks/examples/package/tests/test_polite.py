"""Run with: pip install -e . pytest; pytest"""

from __future__ import annotations

import importlib.metadata
from types import SimpleNamespace

import pytest
from metaclaw_polite import Polite


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("The meeting is on Monday.", -0.5),
        ("Happy to help: it is on Monday.", 1.0),
        ("Thank you! Sorry, please excuse me: Monday.", -1.0),
    ],
)
def test_one_courtesy_is_right(text: str, value: float) -> None:
    assert Polite().score_trace(SimpleNamespace(response_text=text)).value == value


def test_a_pure_tool_call_is_no_opinion() -> None:
    assert Polite().score_trace(SimpleNamespace(response_text="")) is None


def test_the_package_announces_itself() -> None:
    points = importlib.metadata.entry_points(group="metaclaw", name="polite")
    assert {point.value for point in points} == {"metaclaw_polite:Polite"}
