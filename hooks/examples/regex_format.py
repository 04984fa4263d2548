"""Dates are to be written as 2026-11-22. A reply without a date is no opinion, not a zero."""

import re

from metaclaw_hooks import Reward

ISO = re.compile(r"\b\d{4}-\d{2}-\d{2}\b")
OTHER = re.compile(r"\b\d{1,2}[./]\d{1,2}[./]\d{2,4}\b")


def score_trace(trace):
    wrong, right = OTHER.findall(trace.response_text), ISO.findall(trace.response_text)
    if wrong:
        return Reward("regex_format", -1.0, f"{len(wrong)} dates in another form", hint="Write dates as YYYY-MM-DD.")
    return Reward("regex_format", 1.0, f"{len(right)} dates in ISO form") if right else None
