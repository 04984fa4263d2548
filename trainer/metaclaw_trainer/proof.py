"""Does a vLLM give a version's tokens the log-probs that the trainer gave them? Asked before it is said to hold it.

When a version is made, the trainer scores the end of one of the traces that it was trained on, under the new weights.
Each vLLM that has loaded the version scores the same token ids and goes on with one of its own, in one request. If the
two disagree, vLLM has another base model, type or adapter under that name, and is not said to hold the version. What is
kept of the trace goes when its owner deletes it; a version without it has to say one token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import sqlalchemy as sa
from metaclaw_hooks.errors import InvalidNameError
from metaclaw_hooks.names import parse_version

from metaclaw_trainer.codec import pack, unpack
from metaclaw_trainer.errors import VllmRefusedError
from metaclaw_trainer.schema import proofs
from metaclaw_trainer.store import Store
from metaclaw_trainer.vllm_client import VllmClient


@dataclass(frozen=True, slots=True)
class Proof:
    """The end of a sample, scored by the trainer under a version's weights."""

    sample_id: str
    token_ids: tuple[int, ...]  # length T
    logprobs: tuple[float, ...]  # natural, length T - 1: of each token but the first


def save_proof(c: sa.Connection, agent: str, number: int, proof: Proof) -> None:
    """Keep the proof of a version, in the transaction that lists it."""
    packed = {"token_ids": pack("I", proof.token_ids), "logprobs": pack("d", proof.logprobs)}
    c.execute(proofs.insert().values(agent=agent, number=number, sample_id=proof.sample_id, **packed))


def read_proof(store: Store, name: str) -> Proof | None:
    """The proof of the version ``agent@vN``; None: it has none, or the trace was deleted."""
    try:
        agent, number = parse_version(name)
    except InvalidNameError:
        return None  # weights of the fork's wire
    query = sa.select(proofs).where(proofs.c.agent == agent, proofs.c.number == number)
    with store.read() as c:
        row = c.execute(query).first()
    if row is None:
        return None
    return Proof(row.sample_id, tuple(unpack("I", row.token_ids)), tuple(unpack("d", row.logprobs)))


class Prover:
    """Compares vLLM's log-probs with those kept.

    Args:
        read: the proof of a version by its name.
        threshold: mean distance in nats per token above which vLLM is refused.
    """

    def __init__(self, read: Callable[[str], Proof | None], threshold: float) -> None:
        self._read = read
        self._threshold = threshold

    def check(self, client: VllmClient, name: str) -> None:
        """Let ``client`` answer as ``name``: score its proof, or say a token if there is none.

        Raises:
            VllmRefusedError: if it disagrees with the trainer, or will not answer.
            VllmUnavailableError: if it is away.
        """
        proof = self._read(name)
        if proof is None:
            client.say_a_token(name)
            return
        scored = client.prompt_logprobs(name, proof.token_ids, client.patience)
        apart = sum(abs(a - b) for a, b in zip(scored, proof.logprobs, strict=True)) / len(scored)
        if not apart <= self._threshold:
            raise VllmRefusedError(
                f"vLLM at {client.url} and the trainer disagree about {name} by {apart:.2f} nats a token "
                f"(gap_threshold is {self._threshold:g}): another base model, dtype or adapter on one side?"
            )
