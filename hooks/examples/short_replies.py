"""Short replies are good replies."""

BUDGET = 40  # words


def score_trace(trace):
    words = len(trace.response_text.split())
    if words == 0:
        return None  # a pure tool call: no opinion
    return max(-1.0, 1.0 - words / BUDGET)
