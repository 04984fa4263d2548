"""The HTTP application of the trainer."""

from __future__ import annotations

from fastapi import FastAPI

from metaclaw_trainer.api import agents, fork, health, hooks, replies, samples, sampling, versions
from metaclaw_trainer.api.gate import Gate
from metaclaw_trainer.services import Services


def create_app(services: Services) -> FastAPI:
    """The application over rooms that are already wired; starting and stopping them is the caller's."""
    # No /docs: that page is drawn by scripts from elsewhere, and nothing here is fetched from elsewhere.
    app = FastAPI(title="MetaClaw trainer", docs_url=None, redoc_url=None)
    app.state.services = services
    app.add_middleware(Gate, ring=services.keys, max_body=services.settings.max_body_mib * 2**20)
    replies.install(app)
    for room in (health, samples, agents, versions, hooks, fork, sampling):
        app.include_router(room.router)
    return app
