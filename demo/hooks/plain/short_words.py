"""Reward of the agent `plain`: short words. Ten lines, dropped into the folder of hooks."""

import re


def score_trace(trace):
    words = re.findall("[a-z]+", trace.response_text.lower())
    if len(words) < 3:
        return -1.0
    mean = sum(map(len, words)) / len(words)
    return max(-1.0, min(1.0, (4.7 - mean) / 0.8))
