"""The tables of the trainer's own store, declared once.

A sample moves through one column:

    state:  waiting -> claimed -> trained
                    -> set_aside   (will not be trained; ``reason`` says why)
            any     -> recalled    (its owner deleted a trace of it)

Tokens are kept as long as they may be trained on; the row stays for ``keep_settled_days``, so that sending it again
does nothing.

``claimed`` names the process that holds it; what a dead process held waits again.
"""

from __future__ import annotations

import sqlalchemy as sa

metadata = sa.MetaData()

_ROWID = sa.BigInteger().with_variant(sa.Integer, "sqlite")

samples = sa.Table(
    "samples",
    metadata,
    sa.Column("seq", _ROWID, primary_key=True, autoincrement=True),  # order of arrival
    sa.Column("id", sa.String(200), nullable=False, unique=True),  # idempotency key
    sa.Column("agent", sa.String(63), nullable=False),
    sa.Column("session", sa.String(400), nullable=False),
    sa.Column("adapter_version", sa.Integer, nullable=False),  # that drew it
    sa.Column("skill_generation", sa.Integer, nullable=False),
    sa.Column("hint", sa.Text),
    sa.Column("tokens", sa.Integer, nullable=False),  # length T
    sa.Column("token_ids", sa.LargeBinary),  # little-endian uint32; null once recalled
    sa.Column("turns", sa.JSON, nullable=False),  # list of [trace_id, start, length, reward]
    sa.Column("logprobs", sa.LargeBinary),  # little-endian float64, all turns in order; null once recalled
    sa.Column("state", sa.String(16), nullable=False),
    sa.Column("reason", sa.String(400)),
    sa.Column("owner", sa.String(64)),  # process that claimed it
    sa.Column("version", sa.Integer),  # that was trained on it
    sa.Column("received_at", sa.Float, nullable=False),
    sa.Column("settled_at", sa.Float),
    sa.Index("ix_samples_queue", "state", "agent", "seq"),
    sa.Index("ix_samples_owner", "owner"),
    sa.Index("ix_samples_settled", "settled_at"),
)

sample_traces = sa.Table(
    "sample_traces",
    metadata,
    sa.Column("trace_id", sa.String(200), primary_key=True),
    sa.Column("sample_id", sa.String(200), primary_key=True),
)

# Traces that their owner deleted: a sample of one that arrives later is refused.
recalled_traces = sa.Table(
    "recalled_traces",
    metadata,
    sa.Column("trace_id", sa.String(200), primary_key=True),
    sa.Column("at", sa.Float, nullable=False),
)

agents = sa.Table(
    "agents",
    metadata,
    sa.Column("name", sa.String(63), primary_key=True),
    sa.Column("allowed", sa.Boolean, nullable=False),  # may train, as the worker said last
    sa.Column("allowed_from", sa.Float),  # when it said so, and until when that holds; null: until it says otherwise
    sa.Column("allowed_until", sa.Float),
    sa.Column("batch_size", sa.Integer),  # samples a step; null: the setting
    sa.Column("train_now", sa.Boolean, nullable=False),  # take a step with what is queued
    sa.Column("head", sa.Integer, nullable=False),  # version that the next step starts from; 0: the base model
    sa.Column("head_generation", sa.Integer, nullable=False),  # raised when the head is put back
    sa.Column("newest", sa.Integer, nullable=False),  # highest number ever given to a version
    sa.Column("metrics", sa.JSON, nullable=False),  # of the last step
    sa.Column("last_error", sa.String(400)),  # why the last step failed; null: it did not
    sa.Column("retry_at", sa.Float),  # after a failure: not before
    sa.Column("failures", sa.Integer, nullable=False),  # in a row
    sa.Column("owner", sa.String(64)),  # the trainer process that trains it now
)

# One row for each thing counted. "versions" is the last cursor: its row lock makes commits follow one another.
counters = sa.Table(
    "counters",
    metadata,
    sa.Column("name", sa.String(64), primary_key=True),
    sa.Column("label", sa.String(200), primary_key=True),
    sa.Column("value", sa.BigInteger, nullable=False),
)

versions = sa.Table(
    "versions",
    metadata,
    sa.Column(
        "cursor", sa.BigInteger, primary_key=True, autoincrement=False
    ),  # from ``counters``: no gap is ever filled later
    sa.Column("agent", sa.String(63), nullable=False),
    sa.Column("number", sa.Integer, nullable=False),
    sa.Column("manifest", sa.JSON, nullable=False),  # wire.VersionBody without the cursor
    sa.Column("path", sa.Text, nullable=False),
    sa.Column("size", sa.BigInteger, nullable=False),  # bytes on disk
    sa.Column("created_at", sa.Float, nullable=False),
    sa.Column("removed_at", sa.Float),  # its files are gone
    sa.UniqueConstraint("agent", "number"),
)

# The end of a trace that a version was trained on, scored by the trainer, for vLLM to be compared with (proof.py). Goes
# with the version's files, and when the owner deletes a trace of the sample.
proofs = sa.Table(
    "proofs",
    metadata,
    sa.Column("agent", sa.String(63), primary_key=True),
    sa.Column("number", sa.Integer, primary_key=True),
    sa.Column("sample_id", sa.String(200), nullable=False, index=True),
    sa.Column("token_ids", sa.LargeBinary, nullable=False),  # little-endian uint32
    sa.Column("logprobs", sa.LargeBinary, nullable=False),  # little-endian float64, of each token but the first
)

# Trainer processes, so that what a dead one held is given back.
owners = sa.Table(
    "owners",
    metadata,
    sa.Column("id", sa.String(64), primary_key=True),
    sa.Column("host", sa.String(200), nullable=False),
    sa.Column("seen_at", sa.Float, nullable=False),  # heartbeat
)

# The whole set of versions that vLLM shall hold.
served = sa.Table("served", metadata, sa.Column("name", sa.String(80), primary_key=True))

# The whole set of versions whose files stay besides, so that the worker can go back to them.
kept = sa.Table("kept", metadata, sa.Column("name", sa.String(80), primary_key=True))

# What vLLM shall hold besides: the newest weights of each session of the fork's wire.
run_weights = sa.Table(
    "run_weights",
    metadata,
    sa.Column("session_id", sa.String(64), primary_key=True),
    sa.Column("name", sa.String(80), nullable=False),
    sa.Column("path", sa.String(600), nullable=False),
    sa.Column("owner", sa.String(64), nullable=False),  # process whose session it is
)

# Folders that this server wrote for the fork's wire: only these may be loaded again.
issued_paths = sa.Table(
    "issued_paths",
    metadata,
    sa.Column("path", sa.String(600), primary_key=True),
    sa.Column("session_id", sa.String(64), nullable=False),
    sa.Column("caller", sa.String(63), nullable=False),  # name of the key that it was given to
    sa.Column("kind", sa.String(16), nullable=False),  # "weights" or "checkpoints"
    sa.Column("size", sa.BigInteger, nullable=False),  # bytes on disk
    sa.Column("at", sa.Float, nullable=False),
    sa.Column("removed_at", sa.Float),  # its files are gone
)
