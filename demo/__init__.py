"""The demonstration: two agents that get better by being talked to. Run it with ``make demo``."""
