"""Settings of the request path: gateway, store, sessions, capture, skills."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator, model_validator

from metaclaw_plugin.settings_section import Section, resolve_secret


class GatewaySettings(Section):
    """The LiteLLM proxy with our callback."""

    host: str = Field("127.0.0.1", description="Address to listen on; anything but loopback needs keys on every agent.")
    port: int = Field(4000, ge=1, le=65535, description="Port of the gateway.")
    workers: int = Field(1, ge=1, le=64, description="Gateway processes.")
    commit_timeout: float = Field(2.0, gt=0, description="Seconds that an answer's last byte waits for its trace.")
    max_body_bytes: int = Field(32_000_000, ge=1024, description="Longest request body; beyond it, 413.")
    body_timeout: float = Field(
        60.0, gt=0, description="Seconds that a request body may take to arrive; beyond it, 408."
    )
    max_arriving_bytes: int = Field(
        256_000_000,
        ge=1024,
        description="Most bytes that bodies of a gateway process may hold while they arrive, together; beyond it, 503. "
        "Those without a known key have an eighth of it.",
    )
    max_messages: int = Field(4000, ge=1, description="Most messages in one request; beyond it, 413.")
    max_tools: int = Field(1000, ge=1, description="Most tools in one request; beyond it, 413.")
    upstream_key_header: str | None = Field(
        None, description="Header in which callers may send their own key for the listed deployments; unset: none."
    )
    open_routes: list[str] = Field(
        default_factory=list,
        description="Further routes of LiteLLM that agents' keys may call, as paths with `*`, such as `/v1/files*`; a "
        "key may always ask models, list them, and call MetaClaw's own routes.",
    )
    admin_key: str | None = Field(
        None,
        min_length=1,
        description="LiteLLM's master key: in its database mode the worker shows the agents on its Models and Virtual "
        "Keys pages; os.environ/NAME reads a variable; unset: it does not.",
    )

    @field_validator("admin_key")
    @classmethod
    def _from_environment(cls, value: str | None) -> str | None:
        return resolve_secret(value)

    @model_validator(mode="after")
    def _room_for_a_body(self) -> GatewaySettings:
        if self.max_arriving_bytes < self.max_body_bytes:
            raise ValueError(
                f"max_arriving_bytes ({self.max_arriving_bytes}) is less than max_body_bytes ({self.max_body_bytes}), "
                "so that the longest body would never be taken: raise the one, or lower the other"
            )
        return self


class StoreSettings(Section):
    """Where traces, agents, rewards and routes are kept."""

    url: str | None = Field(None, description="SQLAlchemy URL; unset: SQLite in METACLAW_HOME.")
    max_bytes: int | None = Field(None, ge=1, description="Stored bytes of traces beyond which no more are kept.")
    keep_days: float | None = Field(None, gt=0, description="Age at which traces are deleted; unset: never.")
    keep_bytes: int | None = Field(
        None, ge=1, description="Stored bytes of traces beyond which the oldest are deleted; unset: none are."
    )


class SessionSettings(Section):
    """How requests become conversations."""

    idle_timeout: float = Field(1800.0, gt=0, description="Seconds without a request after which a session is closed.")
    held_out_one_in: int = Field(10, ge=0, description="One session in so many is held out for replays; 0: none.")
    side_phrases: list[str] = Field(
        default_factory=list,
        description="A request whose system prompt or newest human message holds one of these is a side call.",
    )


class CaptureSettings(Section):
    """What is kept of an exchange, and when it may be trained on."""

    min_temperature: float = Field(0.5, ge=0, description="Below this sampling temperature a trace is not trainable.")
    max_temperature: float = Field(1.2, gt=0, description="Above this sampling temperature a trace is not trainable.")
    min_top_p: float = Field(0.9, gt=0, le=1, description="Below this top_p a trace is not trainable.")


class EvolutionSettings(Section):
    """New skills from failures: a model is shown them and proposes edits."""

    model: str | None = Field(None, description="Model that writes skills, named as at the gateway; set: it is on.")
    url: str | None = Field(None, description="OpenAI-compatible root URL ending in /v1; unset: our gateway.")
    api_key: str | None = Field(None, description="Key for `url`; os.environ/NAME reads a variable.")
    approval: Literal["auto", "review"] = Field(
        "auto", description="auto: valid edits apply; review: they wait for `metaclaw skills review`."
    )
    failure_reward: float = Field(0.0, ge=-1, le=1, description="A trace with a reward up to this is a failure.")
    min_failures: int = Field(3, ge=1, description="Failures after which the evolver is asked.")
    every_turns: int | None = Field(
        50, ge=1, description="It is also asked after so many scored turns with a failure among them; null: not."
    )
    at_session_end: bool = Field(True, description="It is also asked when a session with a failure in it is closed.")
    support_share: float = Field(
        0.5, gt=0, le=1, description="Share of failed sessions kept for it, and so from training, of agents that train."
    )
    max_traces: int = Field(6, ge=1, le=50, description="Failures shown in one round.")
    max_edits: int = Field(3, ge=1, le=20, description="Edits accepted in one round.")
    max_own_skills: int = Field(100, ge=1, description="Skills that an agent may have of its own.")
    max_body: int = Field(2400, ge=200, le=20_000, description="Characters of an evolved skill's body.")
    max_tokens: int = Field(3000, ge=100, description="Tokens of its answer.")
    timeout: float = Field(120.0, gt=0, description="Seconds for its answer.")
    retire_uses: int | None = Field(
        20, ge=5, description="Sessions with, and without, an own skill before one that hurts is retired; null: never."
    )

    @field_validator("api_key")
    @classmethod
    def _from_environment(cls, value: str | None) -> str | None:
        return resolve_secret(value)


class SkillSettings(Section):
    """Skill library, retrieval and injection."""

    path: Path | None = Field(None, description="Folder of skills; unset: skills/ in METACLAW_HOME.")
    starter: bool = Field(True, description="Fill an empty library with the starter set.")
    max_skills: int = Field(3, ge=0, le=20, description="Most skills injected for one message.")
    max_tokens: int = Field(1500, ge=0, description="Most tokens, about, that the skills for one message may cost.")
    min_relevance: float | None = Field(
        None, ge=0, description="Below this relevance a skill is not injected; unset: what measured best."
    )
    retrieval: Literal["lexical", "embeddings", "fused"] = Field("lexical", description="How relevance is measured.")
    embedder: Literal["model2vec", "onnx", "endpoint"] | None = Field(None, description="What makes sentence vectors.")
    embedder_model: str | None = Field(None, description="Folder of the embedder's model, or its name at the endpoint.")
    embedder_url: str | None = Field(None, description="Root URL of an embeddings endpoint, with /v1.")
    embedder_api_key: str | None = Field(None, description="Its key; os.environ/NAME reads a variable.")
    embedder_timeout: float = Field(1.0, gt=0, description="Seconds after which a selection goes on without vectors.")
    reload_interval: float = Field(1.0, gt=0, description="Seconds between looks for edited skill files.")
    withheld_share: float = Field(
        0.05, ge=0, le=0.5, description="Share of sessions that go without a given skill, to measure it; 0: none."
    )

    evolution: EvolutionSettings = EvolutionSettings()

    @field_validator("embedder_api_key")
    @classmethod
    def _from_environment(cls, value: str | None) -> str | None:
        return resolve_secret(value)
