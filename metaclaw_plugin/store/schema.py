"""The tables of the gateway's store, declared once; migrations are compared with them by a test.

A trace moves through three columns, each by one owner:

    score:    waiting -> scored | unscored      (worker: reward hooks)
    purpose:  unsettled -> query | support | held_out   (worker, before anything of it is forwarded)
    forward:  waiting -> merged -> forwarded -> trained | skipped   (worker, from the trainer's replies)
"""

from __future__ import annotations

import sqlalchemy as sa

metadata = sa.MetaData()

agents = sa.Table(
    "agents",
    metadata,
    sa.Column("name", sa.String(63), primary_key=True),
    sa.Column("mode", sa.String(16)),  # null: the global mode
    sa.Column("skill_generation", sa.Integer, nullable=False, server_default="0"),
    sa.Column("record", sa.Boolean, nullable=False, server_default=sa.true()),
    sa.Column("settings", sa.JSON, nullable=False),  # owner's overrides: publish policy, rewards, windows
    sa.Column("owner", sa.String(400)),  # LiteLLM user or team that first claimed it; null: our own keys
    sa.Column("created_at", sa.Float, nullable=False),
)

keys = sa.Table(
    "keys",
    metadata,
    sa.Column("id", sa.String(32), primary_key=True),
    sa.Column("hash", sa.String(64), nullable=False, unique=True),  # sha256 of the key, hex
    sa.Column("hint", sa.String(16), nullable=False),  # last characters, to tell keys apart
    sa.Column("created_at", sa.Float, nullable=False),
    sa.Column("revoked_at", sa.Float),
)

key_agents = sa.Table(
    "key_agents",
    metadata,
    sa.Column("key_id", sa.ForeignKey("keys.id", ondelete="CASCADE"), primary_key=True),
    sa.Column("agent", sa.ForeignKey("agents.name", ondelete="CASCADE"), primary_key=True),
    sa.Column("position", sa.Integer, nullable=False),  # 0: the agent when no header chooses
)

sessions = sa.Table(
    "sessions",
    metadata,
    sa.Column("id", sa.String(64), primary_key=True),
    sa.Column("agent", sa.String(63), nullable=False),
    sa.Column("evidence", sa.String(32), nullable=False),  # what told it apart: x-session-id, runtime, chain ...
    sa.Column("evidence_key", sa.String(64), nullable=False),  # sha256 of the evidence, hex
    sa.Column("started_at", sa.Float, nullable=False),
    sa.Column("last_at", sa.Float, nullable=False),
    sa.Column("closed_at", sa.Float),
    sa.Column("close_reason", sa.String(32)),
    sa.Column("held_out", sa.Boolean, nullable=False),
    sa.Column("turns", sa.Integer, nullable=False, server_default="0"),
    sa.Column("exchanges", sa.Integer, nullable=False, server_default="0"),
    sa.Column(
        "epoch", sa.Integer, nullable=False, server_default="0"
    ),  # of the client's own counting; a raised one ends it
    sa.Column("anchor", sa.String(64)),  # chain hash up to the human message that is being answered
    sa.Column("adapter_version", sa.Integer),  # of the exchange in progress
    sa.Column("without_skills", sa.JSON, nullable=False),  # left out on purpose, to measure them
    sa.Index("ix_sessions_evidence", "agent", "evidence_key"),
    sa.Index("ix_sessions_open", "closed_at", "last_at"),
    sa.Index(  # few are pinned; a version's end asks for them
        "ix_sessions_pinned",
        "agent",
        "adapter_version",
        "last_at",
        sqlite_where=sa.text("adapter_version IS NOT NULL"),
        postgresql_where=sa.text("adapter_version IS NOT NULL"),
    ),
    # One open session for one piece of evidence, whoever comes first.
    sa.Index(
        "ux_sessions_one_open",
        "agent",
        "evidence_key",
        "epoch",
        unique=True,
        sqlite_where=sa.text("closed_at IS NULL"),
        postgresql_where=sa.text("closed_at IS NULL"),
    ),
)

# Where a conversation can go on: the hash of its messages so far, for requests without other evidence.
chain = sa.Table(
    "chain",
    metadata,
    sa.Column("agent", sa.String(63), primary_key=True),
    sa.Column("hash", sa.String(64), primary_key=True),
    sa.Column("session", sa.String(64), primary_key=True),
    sa.Column("tip", sa.Boolean, nullable=False),  # the session's newest answer ends here
    sa.Column("at", sa.Float, nullable=False),
    sa.Index("ix_chain_session", "session"),
)

# What was injected where, so that later requests of the session get the same bytes (law 7).
injections = sa.Table(
    "injections",
    metadata,
    sa.Column("session", sa.String(64), primary_key=True),
    sa.Column(
        "anchor", sa.String(80), primary_key=True
    ),  # "system", or the human message that carries it: hash#occurrence
    sa.Column("block", sa.Text, nullable=False),
    sa.Column("skills", sa.JSON, nullable=False),  # list of [name, version, shared]
    sa.Column("at", sa.Float, nullable=False),
)

traces = sa.Table(
    "traces",
    metadata,
    sa.Column("seq", sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True, autoincrement=True),
    sa.Column("id", sa.String(40), nullable=False, unique=True),
    sa.Column("request_id", sa.String(64), nullable=False),
    sa.Column("agent", sa.String(63), nullable=False),
    sa.Column("session", sa.String(64), nullable=False),
    sa.Column("turn", sa.Integer, nullable=False),
    sa.Column("exchange", sa.Integer, nullable=False),
    sa.Column("kind", sa.String(8), nullable=False),
    sa.Column("route", sa.String(16), nullable=False),
    sa.Column("model", sa.String(200), nullable=False),
    sa.Column("adapter_version", sa.Integer, nullable=False),
    sa.Column("skill_generation", sa.Integer, nullable=False),
    sa.Column("response_id", sa.String(1000)),  # those of LiteLLM's Responses route are long
    sa.Column("finish_reason", sa.String(32)),
    sa.Column("started_at", sa.Float, nullable=False),
    sa.Column("first_token_at", sa.Float),
    sa.Column("finished_at", sa.Float, nullable=False),
    sa.Column("trainable", sa.Boolean, nullable=False),
    sa.Column("reason", sa.String(400)),
    sa.Column("prompt_tokens", sa.Integer),
    sa.Column("response_tokens", sa.Integer),
    sa.Column("size", sa.Integer, nullable=False),  # bytes of the body and the token columns
    sa.Column(
        "body", sa.LargeBinary, nullable=False
    ),  # zlib of JSON: messages, tools, response, sampling, skills, template hash
    sa.Column("prompt_token_ids", sa.LargeBinary),  # codec.encode_ids
    sa.Column("response_token_ids", sa.LargeBinary),  # codec.encode_ids
    sa.Column("response_logprobs", sa.LargeBinary),  # little-endian float64
    # Worker's columns.
    sa.Column("score", sa.String(16), nullable=False, server_default="waiting"),
    sa.Column("reward", sa.Float),  # combined; null: no opinion
    sa.Column("scored_at", sa.Float),
    sa.Column("hint", sa.Text),
    sa.Column("purpose", sa.String(16), nullable=False, server_default="unsettled"),
    sa.Column("forward", sa.String(16), nullable=False, server_default="waiting"),
    sa.Column("forward_reason", sa.String(400)),  # why it is skipped
    sa.Column("sample_id", sa.String(64)),
    sa.Column("told_reward", sa.Float),  # that the trainer has for it; null: not sent, or not known
    sa.Column("lease_owner", sa.String(64)),
    sa.Column("lease_until", sa.Float),
    sa.Index("ix_traces_agent", "agent", "seq"),
    sa.Index("ix_traces_session", "session", "turn"),
    sa.Index("ix_traces_response", "response_id"),
    sa.Index("ix_traces_score", "score", "seq"),
    sa.Index("ix_traces_forward", "forward", "score", "agent", "seq"),
    sa.Index("ix_traces_sample", "sample_id"),
    sa.Index("ix_traces_lease", "lease_owner"),
)

rewards = sa.Table(
    "rewards",
    metadata,
    sa.Column("trace_id", sa.String(40), primary_key=True),
    sa.Column("source", sa.String(64), primary_key=True),
    sa.Column("value", sa.Float, nullable=False),
    sa.Column("confidence", sa.Float, nullable=False),
    sa.Column("rationale", sa.Text, nullable=False),
    sa.Column("hint", sa.Text),
    sa.Column("at", sa.Float, nullable=False),
)

# Feedback may name a response before its trace is stored; the worker joins them.
feedback = sa.Table(
    "feedback",
    metadata,
    sa.Column("id", sa.String(32), primary_key=True),
    sa.Column("agent", sa.String(63), nullable=False),
    sa.Column("target", sa.String(1000), nullable=False),  # trace id or response id
    sa.Column("value", sa.Float, nullable=False),
    sa.Column("comment", sa.Text, nullable=False),
    sa.Column("at", sa.Float, nullable=False),
    sa.Column("applied_at", sa.Float),
    sa.Index("ix_feedback_open", "applied_at", "target"),
)

# Traces that were deleted after they had gone to the trainer, which forgets them too.
recalls = sa.Table(
    "recalls",
    metadata,
    sa.Column("trace_id", sa.String(40), primary_key=True),
    sa.Column("agent", sa.String(63), nullable=False),
    sa.Column("cause", sa.String(16), nullable=False),  # owner, or retention
    sa.Column("at", sa.Float, nullable=False),
    sa.Column("settled_at", sa.Float),  # the trainer has answered
    sa.Column("left_out_at", sa.Float),  # the owner had the agent retrained without it; no version of it may serve
    sa.Index("ix_recalls_open", "settled_at", "at"),
)

adapters = sa.Table(
    "adapters",
    metadata,
    sa.Column("agent", sa.String(63), primary_key=True),
    sa.Column("number", sa.Integer, primary_key=True),
    sa.Column("state", sa.String(16), nullable=False),
    sa.Column("manifest", sa.JSON, nullable=False),  # wire.VersionBody
    sa.Column("decision", sa.JSON),  # the gate's figures and sentence
    sa.Column("decided_at", sa.Float),
    sa.Column("served_at", sa.Float),  # when it last took the route; rises with each that takes it
    sa.Column("wish", sa.String(16)),  # still to be carried out: serve (the owner's word), or withdraw when drained
    sa.Column("wished_from", sa.String(16)),  # the state it goes back to when the wish to serve is dropped
    sa.Column("announced_at", sa.Float),  # adapter_published was called
    sa.Column("problem", sa.Text),  # why it could not be loaded, while that lasts
    sa.Column("created_at", sa.Float, nullable=False),
    sa.Index("ix_adapters_state", "state", "agent"),
    sa.Index("ix_adapters_served", "agent", "served_at"),
)

# Which version answers an agent's next exchange. No row, or version 0: the base model.
routes = sa.Table(
    "routes",
    metadata,
    sa.Column("agent", sa.String(63), primary_key=True),
    sa.Column("version", sa.Integer, nullable=False),
    sa.Column("changed_at", sa.Float, nullable=False),
    sa.Column("base_at", sa.Float),  # when the base model last took the route from a version; as adapters.served_at
    sa.Column("head", sa.Integer),  # version that the trainer must be told to go on from; null: nothing to tell
    sa.Column("canary", sa.Integer),  # version on trial with a share of the sessions that begin from now on
    sa.Column("canary_share", sa.Float),  # in (0, 1)
    sa.Column("canary_since", sa.Float),
)

# Requests that each gateway process has in flight, so that a version is unloaded only when its last one ended.
in_flight = sa.Table(
    "in_flight",
    metadata,
    sa.Column("process", sa.String(64), primary_key=True),
    sa.Column("agent", sa.String(63), primary_key=True),
    sa.Column("version", sa.Integer, primary_key=True),
    sa.Column("requests", sa.Integer, nullable=False),
    sa.Column(
        "at", sa.Float, nullable=False
    ),  # heartbeat, rising per process: one that stands still is of a dead process
)

# When each agent was last asked for anything, and when anyone was, kept or not: one row each, for idle windows.
last_requests = sa.Table(
    "last_requests",
    metadata,
    sa.Column("agent", sa.String(63), primary_key=True),  # "": anyone
    sa.Column("at", sa.Float, nullable=False),
)

# Things counted across processes: lost traces, failed hooks, refused samples.
counters = sa.Table(
    "counters",
    metadata,
    sa.Column("name", sa.String(64), primary_key=True),
    sa.Column("label", sa.String(200), primary_key=True),  # what it is counted for: an agent, a plugin, a reason
    sa.Column("value", sa.BigInteger, nullable=False),
    sa.Column("at", sa.Float, nullable=False),
)

# What the judge said of what, so that it is asked once.
judgements = sa.Table(
    "judgements",
    metadata,
    sa.Column("key", sa.String(64), primary_key=True),  # sha256 of the model, the votes and all that it was shown
    sa.Column("trace_id", sa.String(40), nullable=False),  # it may quote this one, and goes when that goes
    sa.Column("value", sa.JSON, nullable=False),
    sa.Column("at", sa.Float, nullable=False),
    sa.Index("ix_judgements_at", "at"),
)

# Work that one process does at a time, such as forwarding one agent's samples.
leases = sa.Table(
    "leases",
    metadata,
    sa.Column("name", sa.String(100), primary_key=True),
    sa.Column("owner", sa.String(64), nullable=False),
    sa.Column("until", sa.Float, nullable=False),  # free again after this, should the owner die
)

# Small shared facts, such as how far the trainer's list of versions was read.
facts = sa.Table(
    "facts",
    metadata,
    sa.Column("name", sa.String(64), primary_key=True),
    sa.Column("value", sa.JSON, nullable=False),
    sa.Column("at", sa.Float, nullable=False),
)

# How a skill does: one row for each skill, per agent.
skill_ledger = sa.Table(
    "skill_ledger",
    metadata,
    sa.Column("agent", sa.String(63), primary_key=True),
    sa.Column("skill", sa.String(63), primary_key=True),
    sa.Column("uses", sa.Integer, nullable=False),
    sa.Column("sum_with", sa.Float, nullable=False),
    sa.Column("sumsq_with", sa.Float, nullable=False),
    sa.Column("n_with", sa.Integer, nullable=False),
    sa.Column("sum_without", sa.Float, nullable=False),
    sa.Column("sumsq_without", sa.Float, nullable=False),
    sa.Column("n_without", sa.Integer, nullable=False),
)

# Which sessions a skill was relevant in, and whether it was injected or left out on purpose, to measure it.
skill_exposures = sa.Table(
    "skill_exposures",
    metadata,
    sa.Column("session", sa.String(64), primary_key=True),
    sa.Column("skill", sa.String(63), primary_key=True),
    sa.Column("agent", sa.String(63), nullable=False),
    sa.Column("version", sa.String(12), nullable=False),
    sa.Column("shared", sa.Boolean, nullable=False),
    sa.Column("withheld", sa.Boolean, nullable=False),
    sa.Column("exchange", sa.Integer, nullable=False),  # the first that it was relevant for
    sa.Column("at", sa.Float, nullable=False),
    sa.Index("ix_skill_exposures_skill", "agent", "skill"),
)

# Traces kept for the skill evolver (law 8): failed ones, and those of their session that they build on.
skill_support = sa.Table(
    "skill_support",
    metadata,
    sa.Column("trace_id", sa.String(40), primary_key=True),
    sa.Column("agent", sa.String(63), nullable=False),
    sa.Column("session", sa.String(64), nullable=False),
    sa.Column("failed", sa.Boolean, nullable=False),  # false: it is context of a failed one
    sa.Column("round", sa.String(32)),  # that it was shown in; null: not shown yet
    sa.Column("attempts", sa.Integer, nullable=False),  # rounds that failed with it
    sa.Column("at", sa.Float, nullable=False),
    sa.Index("ix_skill_support_open", "agent", "round"),
)

# One question to the evolver, and what came of it.
skill_rounds = sa.Table(
    "skill_rounds",
    metadata,
    sa.Column("id", sa.String(32), primary_key=True),
    sa.Column("agent", sa.String(63), nullable=False),
    sa.Column("state", sa.String(16), nullable=False),  # applied, proposed, nothing or failed
    sa.Column("model", sa.String(200), nullable=False),
    sa.Column("prompt_version", sa.String(16), nullable=False),
    sa.Column("trace_ids", sa.JSON, nullable=False),
    sa.Column("detail", sa.JSON, nullable=False),  # accepted and refused edits, or the error
    sa.Column("generation", sa.Integer, nullable=False),  # of the agent's skills, after it
    sa.Column("seconds", sa.Float, nullable=False),
    sa.Column("at", sa.Float, nullable=False),
    sa.Index("ix_skill_rounds_agent", "agent", "at"),
)
