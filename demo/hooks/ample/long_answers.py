"""Reward of the agent `ample`: long answers. Ten lines, dropped into the folder of hooks."""


def score_trace(trace):
    text = trace.response_text
    if len(text.split()) < 3:
        return -1.0
    return max(-1.0, min(1.0, (len(text) - 165) / 50))
