"""Which rewards count for an agent, how much, and what they wait for."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum

from metaclaw_hooks.plugins import Plugins

from metaclaw_plugin.errors import ConfigError
from metaclaw_plugin.settings import RewardSettings
from metaclaw_plugin.store.agents import AgentRecord
from metaclaw_plugin.worker.combine import weights_for
from metaclaw_plugin.worker.modes import with_own

logger = logging.getLogger(__name__)

INFERRED = ("next_turn", "tool_outcome")  # on unless the owner has a reward of his own for the agent


class Wait(Enum):
    """What a reply is scored after."""

    NOTHING = "nothing"
    FOLLOWED = "what followed"
    CLOSED = "session end"


@dataclass(frozen=True, slots=True)
class RewardPlan:
    """How one agent's traces are scored."""

    weights: Mapping[str, float]  # of the reward plugins that are on
    turn_rewards: tuple[str, ...]  # asked about each turn
    session_rewards: tuple[str, ...]  # asked about a whole session, and spread over its turns
    wait: Wait
    settings: RewardSettings

    def weight(self, source: str) -> float:
        """The weight of a plugin's opinion; 0 for one that is off."""
        return self.weights.get(source, 0.0)


def plan_rewards(plugins: Plugins, settings: RewardSettings, agent: str) -> RewardPlan:
    """The plan for ``agent``.

    A weight that is set counts, the agent's own before the general one. Else a plugin weighs 1, but for the rewards
    that only infer: they are off for an agent for which a file or package of the owner's gives rewards.
    """
    names = plugins.implementers("score_trace", agent)
    built_in = plugins.built_in
    has_own = any(name not in built_in for name in names)
    weights: dict[str, float] = {}
    for name in names:
        standard = 0.0 if has_own and name in INFERRED and name in built_in else 1.0
        weight = weights_for(settings, agent, standard)(name)
        if weight > 0:
            weights[name] = weight
    whole = [name for name in weights if plugins.scores_session(name) and settings.session_credit != "per_turn"]
    if whole:
        wait = Wait.CLOSED
    elif not weights or any(plugins.reads_what_followed(name) for name in weights):
        wait = Wait.FOLLOWED
    else:
        wait = Wait.NOTHING
    each = tuple(name for name in weights if name not in whole)
    return RewardPlan(weights, each, tuple(whole), wait, settings)


def plan_all(plugins: Plugins, settings: RewardSettings, agents: Iterable[AgentRecord]) -> dict[str, RewardPlan]:
    """The plans of all agents, with what their owners set for them alone."""
    plans = {}
    for record in agents:
        try:
            own = with_own(settings, record.settings.get("rewards"))
        except ConfigError as error:
            logger.warning("rewards of %s: %s; the general settings are used", record.name, error)
            own = settings
        plans[record.name] = plan_rewards(plugins, own, record.name)
    return plans
