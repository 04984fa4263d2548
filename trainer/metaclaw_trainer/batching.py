"""From samples to what the engine computes on: datums, staleness, micro-batches.

A datum predicts chosen tokens only. ``predict_at_N`` are the positions whose *next* token was sampled, so that logits
are computed there and nowhere else; a merged session is one datum with the positions of all its turns.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from metaclaw_hooks.types import Sample
from torch import Tensor

from metaclaw_trainer.errors import InvalidDatumError


@dataclass(frozen=True, slots=True)
class Pull:
    """Another distribution that the sampled tokens are held to: - coefficient (now - logprobs) joins the advantage.

    In expectation over the sampler's own tokens that is the gradient of the reverse KL to it.
    """

    name: str  # of its metric: "base", "teacher", "hint"
    coefficient: float
    logprobs_N: Tensor


@dataclass(frozen=True, slots=True)
class Datum:
    """One sequence of length L with N predicted tokens."""

    input_ids_L: Tensor  # int64
    predict_at_N: Tensor  # int64, ascending, in [0, L)
    targets_N: Tensor  # int64
    sampled_N: Tensor  # float32, log-probability under the sampler, before temperature
    advantages_N: Tensor  # float32
    pulls: tuple[Pull, ...] = ()

    @property
    def length(self) -> int:
        return int(self.input_ids_L.shape[0])

    @property
    def predicted(self) -> int:
        return int(self.targets_N.shape[0])

    def pulled(self, *pulls: Pull) -> Datum:
        return replace(self, pulls=self.pulls + pulls)


def datum_of(sample: Sample, advantages: Sequence[float]) -> Datum:
    """The datum of a sample; ``advantages``: one for each of its turns.

    Raises:
        InvalidDatumError: if the number of advantages is not that of turns.
    """
    if len(advantages) != len(sample.turns):
        raise InvalidDatumError(f"sample {sample.id} has {len(sample.turns)} turns, but {len(advantages)} advantages")
    at = [position for turn in sample.turns for position in range(turn.start, turn.end)]
    tokens = torch.tensor(sample.token_ids, dtype=torch.int64)
    at_N = torch.tensor(at, dtype=torch.int64)
    spread = [value for turn, value in zip(sample.turns, advantages, strict=True) for _ in turn.logprobs]
    return Datum(
        input_ids_L=tokens[: at[-1]],  # what comes after the last sampled token changes nothing
        predict_at_N=at_N - 1,
        targets_N=tokens[at_N],
        sampled_N=torch.tensor([value for turn in sample.turns for value in turn.logprobs], dtype=torch.float32),
        advantages_N=torch.tensor(spread, dtype=torch.float32),
    )


def datum_of_lists(
    input_tokens: Sequence[int], target_tokens: Sequence[int], logprobs: Sequence[float], advantages: Sequence[float]
) -> Datum:
    """The datum of the fork's wire: four lists of length T, with zeros for log-prob and advantage on the prompt.

    Raises:
        InvalidDatumError: if the lengths disagree or every position is prompt.
    """
    lengths = {len(input_tokens), len(target_tokens), len(logprobs), len(advantages)}
    if len(lengths) != 1:
        raise InvalidDatumError(
            f"lengths disagree: {len(input_tokens)} model_input_tokens, {len(target_tokens)} target_tokens, "
            f"{len(logprobs)} logprobs, {len(advantages)} advantages; all four must be the same"
        )
    at = [i for i, pair in enumerate(zip(logprobs, advantages, strict=True)) if pair != (0.0, 0.0)]
    if not at:
        raise InvalidDatumError("no position has a log-prob or an advantage: the response is empty")
    at_N = torch.tensor(at, dtype=torch.int64)
    return Datum(
        input_ids_L=torch.tensor(input_tokens[: at[-1] + 1], dtype=torch.int64),
        predict_at_N=at_N,
        targets_N=torch.tensor(target_tokens, dtype=torch.int64)[at_N],
        sampled_N=torch.tensor(logprobs, dtype=torch.float32)[at_N],
        advantages_N=torch.tensor(advantages, dtype=torch.float32)[at_N],
    )


def check_datum(datum: Datum, vocabulary: int, max_tokens: int) -> None:
    """Refuse what cannot be trained on.

    Raises:
        InvalidDatumError: for token ids outside the vocabulary, too many tokens, or numbers that are none.
    """
    if datum.predicted == 0:
        raise InvalidDatumError("the datum has no sampled token: the response is empty")
    if datum.length > max_tokens:
        raise InvalidDatumError(
            f"the datum has {datum.length} tokens, more than max_sample_tokens ({max_tokens}): raise that or split it"
        )
    for tokens in (datum.input_ids_L, datum.targets_N):
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high >= vocabulary:
            raise InvalidDatumError(
                f"token id {low if low < 0 else high} is outside the base model's vocabulary (0 to {vocabulary - 1}): "
                "sampler and trainer have different models"
            )
    for name, values in (("log-probability", datum.sampled_N), ("advantage", datum.advantages_N)):
        if not bool(torch.isfinite(values).all()):
            raise InvalidDatumError(f"the datum holds a {name} that is NaN or infinite")


def staleness(sample: Sample, head: int) -> int:
    """How many adapter versions lie between the one that drew the sample and the head."""
    return abs(head - sample.adapter_version)


def micro_batches(datums: Sequence[Datum], token_budget: int, padding: int) -> Iterator[list[int]]:
    """Indexes of datums that share one right-padded forward pass of at most ``token_budget`` tokens, or are alone.

    Similar lengths go together, so that none is padded by more than ``padding`` tokens; every index comes exactly once.
    """
    group: list[int] = []
    for index in sorted(range(len(datums)), key=lambda i: (-datums[i].length, i)):
        longest = datums[group[0]].length if group else 0
        if group and (longest * (len(group) + 1) > token_budget or longest - datums[index].length > padding):
            yield group
            group = []
        group.append(index)
    if group:
        yield group
