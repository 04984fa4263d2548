"""Agents: may they train, where do they stand, why is nothing training."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends
from metaclaw_hooks.wire import AgentsReply, AgentStatus, AgentTraining, HeadRequest, TrainReply

from metaclaw_trainer.api.access import AgentInPath, services_of
from metaclaw_trainer.services import Services

router = APIRouter(tags=["agents"])
Wired = Annotated[Services, Depends(services_of)]


@router.get("/v1/agents")
def list_agents(services: Wired) -> AgentsReply:
    """Queue, step and head of every agent, and in one line why nothing of it is training."""
    return AgentsReply(agents=services.agents.statuses())


@router.put("/v1/agents/{agent}")
def set_agent(agent: AgentInPath, body: AgentTraining, services: Wired) -> AgentStatus:
    """Set whether the agent may train now, and how many samples make a step; what is null stays as it is."""
    return services.agents.set_training(agent, body)


@router.get("/v1/agents/{agent}")
def get_agent(agent: AgentInPath, services: Wired) -> AgentStatus:
    """One agent."""
    return services.agents.status(agent)


@router.post("/v1/agents/{agent}/head")
def put_head(agent: AgentInPath, body: HeadRequest, services: Wired) -> AgentStatus:
    """The next step starts from this version, optimiser included; a step that is running is thrown away."""
    services.agents.status(agent)
    services.versions.put_head(agent, body.version)
    return services.agents.status(agent)


@router.post("/v1/agents/{agent}/train")
def train(agent: AgentInPath, services: Wired) -> TrainReply:
    """Take a step with what is queued, however little that is."""
    reason = services.agents.train_now(agent)
    return TrainReply(started=reason is None, reason=reason)
