"""What the training loop asks of the store, and nothing more. No torch here.

claimed = queue.claim(agent, n)            samples leave "waiting"
versions.commit(version, sample_ids)       one transaction: the version is listed, its samples are trained
queue.set_aside / queue.release            what was claimed and not trained
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from metaclaw_hooks.types import AdapterVersion, Sample

from metaclaw_trainer.proof import Proof


@dataclass(frozen=True, slots=True)
class Head:
    """Where an agent's training stands."""

    head: int  # version that the next step starts from; 0: the base model
    newest: int  # highest number ever given to a version
    generation: int = 0  # raised whenever the head is put back; a step that began before is not committed


class SampleQueue(Protocol):
    """Durable samples. Calls may come from any thread."""

    def ready(self) -> Sequence[tuple[str, int]]:
        """Agents that may train now and have enough samples, with how many to claim; longest waiting first."""
        ...

    def claim(self, agent: str, n: int) -> list[Sample]:
        """Up to ``n`` waiting samples in order of arrival; they are leased to this process."""
        ...

    def set_aside(self, ids: Sequence[str], reason: str) -> None:
        """These will never be trained; ``reason`` is one line for the owner."""
        ...

    def release(self, ids: Sequence[str], reason: str | None = None) -> None:
        """These wait again; ``reason``: why the step failed (shown as the agent's idle reason, retried later)."""
        ...


class VersionStore(Protocol):
    """The list of versions. Calls may come from any thread."""

    def head(self, agent: str) -> Head:
        """Where the agent's training stands; ``Head(0, 0)`` for one that never trained."""
        ...

    def commit(
        self, version: AdapterVersion, sample_ids: Sequence[str], generation: int, proof: Proof | None = None
    ) -> bool:
        """In one transaction: list the version with its proof, make it the head, mark its samples trained.

        Committing a version that is listed already changes nothing and returns True. Returns False, and changes
        nothing, if the head was put back meanwhile (``generation`` is not the current one).
        """
        ...

    def skipped(self, agent: str, sample_ids: Sequence[str], reason: str) -> None:
        """A batch without signal: its samples are spent without a version, counted, ``reason`` shown."""
        ...
