"""Every training step as a point in trackio. For wandb write ``import wandb as tracker``: the calls are the same.

This one is run by the trainer, so install trackio there: pip install trackio
"""

import trackio as tracker

runs = []


def after_step(agent, metrics):
    if not runs:
        runs.append(tracker.init(project="metaclaw"))
    tracker.log({f"{agent}/{name}": value for name, value in metrics.items()})
