"""One line for each agent: why is nothing training? The first thing on the way that is in the way."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from metaclaw_plugin.status.store_reader import StoredAgent

LEARNING = ("rl", "auto")


@dataclass(frozen=True)
class TrainerView:
    """The trainer as seen from here: what it said of its agents, or why it said nothing."""

    agents: dict[str, dict[str, Any]]  # wire.AgentStatus by agent
    problem: str | None = None


def why_not_training(
    agent: StoredAgent, mode: str, rl_enabled: bool, trainer: TrainerView, worker_problem: str | None
) -> str:
    """The line for ``agent``, whose effective mode is ``mode``. A running step is said as well."""
    if mode not in LEARNING:
        return f"mode {mode}: " + ("passed through" if mode == "off" else "learns skills, not weights")
    if not rl_enabled:
        return "metaclaw.rl.enabled is false: no trainer"
    if agent.traces == 0:
        return "no request yet: point the agent at the gateway with its key"
    there = trainer.agents.get(agent.name)
    if there is not None and there.get("training"):
        return f"training now: step {there.get('step', 0) + 1}"
    if trainer.problem is not None:
        return f"the trainer {trainer.problem}; {agent.unscored + agent.unforwarded} traces wait here"
    if worker_problem is not None and agent.unscored + agent.unforwarded > 0:
        return f"the worker {worker_problem}; {agent.unscored + agent.unforwarded} traces wait for it"
    queued = int(there.get("queued", 0)) if there else 0
    if queued == 0 and (line := _nothing_arrives(agent)):
        return line
    if mode == "auto" and agent.shut is not None:
        return agent.shut
    if there is None:
        return f"the trainer has no sample of it yet; {agent.unscored + agent.unforwarded} traces are on their way"
    return str(there.get("idle_reason") or f"{queued} of {there.get('batch_size', '?')} samples are queued")


def _nothing_arrives(agent: StoredAgent) -> str | None:
    """Why no sample of it reaches the trainer, as far as the store can tell."""
    if agent.newest and agent.trainable == 0:
        reason = f": {agent.reasons[0][0]}" if agent.reasons else ""
        return f"none of the newest {agent.newest} traces is trainable{reason}"
    if agent.unscored:
        return f"{agent.unscored} traces wait for their reward (it often comes with the next message)"
    if agent.without_reward and agent.without_reward >= agent.traces - agent.skipped:
        return f"no reward plugin has an opinion on its {agent.without_reward} traces: see `metaclaw hooks`"
    return None
