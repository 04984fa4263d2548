"""The model's only owner: one frozen base, any number of adapters by key, forward, backward, step.

Every method belongs to the thread that made the engine (see ``engine_thread``); another one is refused. A gradient
accumulates over calls of ``forward_backward`` until ``optim_step`` uses it up.
"""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from metaclaw_trainer.adapters import Adapter, AdapterConfig, AdapterState, OptimiserOptions
from metaclaw_trainer.base_model import BaseModel, load_base
from metaclaw_trainer.batching import Datum, check_datum, micro_batches
from metaclaw_trainer.errors import (
    EngineError,
    NonFiniteError,
    OutOfMemoryError,
    WrongThreadError,
)
from metaclaw_trainer.forward import Scored, score
from metaclaw_trainer.freed_memory import give_back
from metaclaw_trainer.losses import BUILT_IN, Loss, LossOptions, find_loss, token_weights
from metaclaw_trainer.objective import BatchResult, Tally, objective
from metaclaw_trainer.settings import TrainerSettings
from metaclaw_trainer.shelf import AdapterShelf

log = logging.getLogger(__name__)

# Tokens whose arithmetic takes as long as a further pass does before it computes anything: starting its operations, and
# reading all weights once.
_PADDING = {"cpu": 32, "cuda": 256}

_MEMORY = (
    "out of memory in a forward or backward pass; no step was taken. Lower micro_batch_tokens or max_sample_tokens, "
    "or set gradient_checkpointing: true"
)


class LoraEngine:
    """One base model with its adapters."""

    def __init__(self, settings: TrainerSettings, base: BaseModel | None = None) -> None:
        """Load the base model, unless ``base`` is it.

        Raises:
            ModelLoadError: if that fails.
        """
        self._owner = threading.get_ident()
        self.settings = settings
        self.base: BaseModel = base or load_base(settings)
        given = settings.padding_limit
        self._padding = given if given is not None else _PADDING[self.base.device.type]
        self.losses: dict[str, Loss] = dict(BUILT_IN)
        self.shelf = AdapterShelf(self.base, settings.base_model, settings.max_hot_adapters)

    # adapters in and out

    def adapters(self) -> list[str]:
        """Keys of all adapters, in the model or paged out."""
        self._mine()
        return self.shelf.keys()

    def create(self, key: str, config: AdapterConfig | None = None, seed: int = 0) -> int:
        """A new adapter that changes nothing yet (B is 0); returns its number of parameters.

        Raises:
            AdapterExistsError: if there is one of that key.
            EngineError: if the targets name no layer of the model.
        """
        self._mine()
        adapter = self.shelf.create(key, config or AdapterConfig.of(self.settings), seed)
        return sum(weight.numel() for weight in adapter.weights)

    def drop(self, key: str) -> None:
        """Forget an adapter, gradient and optimiser included; nothing happens if there is none."""
        self._mine()
        self.shelf.drop(key)

    def page_out(self, key: str) -> None:
        """Move an adapter out of the model into plain memory; it comes back by itself when it is used.

        Raises:
            UnknownAdapterError: if there is none.
            EngineError: if it holds a gradient that no step has used.
        """
        self._mine()
        self.shelf.page_out(key)

    def page_in(self, key: str) -> None:
        """Move an adapter back into the model.

        Raises:
            UnknownAdapterError: if there is none.
        """
        self._mine()
        self.shelf.get(key)

    def state(self, key: str) -> AdapterState:
        """A copy of weights and optimiser, on the CPU."""
        self._mine()
        return self.shelf.state(key)

    def restore(self, key: str, state: AdapterState) -> None:
        """Put ``state`` in the place of the adapter ``key``, or make it; on failure everything is as it was.

        Raises:
            CheckpointRefusedError: if the state does not fit the base model.
        """
        self._mine()
        self.shelf.restore(key, state)

    # numbers

    def register_losses(self, plugin: str, losses: Mapping[str, Loss]) -> None:
        """Add losses of a plugin; a name that is taken stays with whoever has it."""
        self._mine()
        for name, loss in losses.items():
            if name in self.losses:
                log.warning("plugin %s registers the loss %r, which is there already: ignored", plugin, name)
            else:
                self.losses[name] = loss

    def forward_backward(
        self,
        key: str,
        datums: Sequence[Datum],
        loss: str | None = None,
        options: LossOptions | None = None,
    ) -> BatchResult:
        """Add the gradient of the loss over ``datums`` to that of the adapter ``key``.

        If it fails, the gradient is as it was before the call. When memory runs out, it is tried again with less of
        it: one datum at a time, then with activations computed twice.

        Raises:
            UnknownAdapterError, UnknownLossError, InvalidDatumError: before anything is computed.
            NonFiniteError: if the loss is NaN or infinite.
            OutOfMemoryError: if the device has too little memory even so.
        """
        self._mine()
        function = find_loss(loss or self.settings.loss, self.losses)
        options = options or LossOptions.of(self.settings)
        for datum in datums:
            check_datum(datum, self.base.vocabulary, self.settings.max_sample_tokens)
        adapter = self.shelf.get(key)
        weights = token_weights([datum.predicted for datum in datums], options)
        tokens = sum(datum.length for datum in datums)
        for budget, thrifty in ((self.settings.micro_batch_tokens, False), (1, False), (1, True)):
            tally = Tally(datums)
            try:
                with self.shelf.using(key, tokens), _or_as_it_was(adapter):
                    for group in micro_batches(datums, budget, self._padding):
                        scored = self._score([datums[i] for i in group], differentiate=True, thrifty=thrifty)
                        total = objective(group, scored, weights, function, options, tally)
                        total.backward()  # type: ignore[no-untyped-call]
                return tally.result()
            except OutOfMemoryError:
                self._free_memory()
                if thrifty:
                    raise
                log.warning("out of memory with %d datums of %r; trying again with less", len(datums), key)
        raise AssertionError("the last attempt returns or raises")

    def logprobs(self, key: str | None, datums: Sequence[Datum]) -> list[Tensor]:
        """Log-probabilities [N] of each datum's targets under adapter ``key``, or under the base model (None)."""
        self._mine()
        for datum in datums:
            check_datum(datum, self.base.vocabulary, self.settings.max_sample_tokens)
        found: list[Tensor] = [torch.empty(0)] * len(datums)
        tokens = sum(datum.length for datum in datums)
        with torch.no_grad(), self.shelf.using(key, tokens), _translated_memory_errors():
            for group in micro_batches(datums, self.settings.micro_batch_tokens, self._padding):
                for index, one in zip(group, self._score([datums[i] for i in group]), strict=True):
                    found[index] = one.logprobs_N.cpu()
        return found

    def zero_grad(self, key: str) -> None:
        """Forget the accumulated gradient."""
        self._mine()
        self.shelf.get(key).clear_gradient()

    def optim_step(self, key: str, options: OptimiserOptions) -> dict[str, float]:
        """One AdamW step on the accumulated gradient, which is then used up.

        Raises:
            NonFiniteError: if the gradient is NaN or infinite; the weights are as they were.
            EngineError: if there is no gradient.
        """
        self._mine()
        adapter = self.shelf.get(key)
        if not adapter.has_gradient:
            raise EngineError(f"adapter {key!r} has no gradient: call forward_backward before optim_step")
        norm = adapter.apply(options)
        self.shelf.moved()
        give_back()
        if not math.isfinite(norm):
            raise NonFiniteError(
                f"the gradient of {key!r} is {norm}: no step was taken; look for a reward or learning "
                "rate that is far too large"
            )
        return {"grad_norm": norm, "learning_rate": options.learning_rate, "step": float(adapter.step)}

    # inside

    def _score(self, datums: Sequence[Datum], differentiate: bool = False, thrifty: bool = False) -> list[Scored]:
        mode, longest = self.settings.gradient_checkpointing, max(datum.length for datum in datums)
        wanted = longest > self.settings.checkpoint_above_tokens if mode == "auto" else mode
        self.base.recompute_activations(differentiate and (wanted or thrifty))
        return score(self.base.model, datums, self.base.device)

    def _mine(self) -> None:
        if threading.get_ident() != self._owner:
            raise WrongThreadError("the model belongs to another thread: go through EngineThread.submit")

    def _free_memory(self) -> None:
        """Give back what torch holds for later, and the buffers of sums."""
        self.shelf.free_memory()
        give_back()
        if self.base.device.type == "cuda":
            torch.cuda.empty_cache()


@contextmanager
def _or_as_it_was(adapter: Adapter) -> Iterator[None]:
    """Whatever fails inside leaves the adapter's gradient as it was before."""
    before = [None if weight.grad is None else weight.grad.clone() for weight in adapter.weights]
    try:
        with _translated_memory_errors():
            yield
    except BaseException:
        for weight, gradient in zip(adapter.weights, before, strict=True):
            weight.grad = gradient
        raise


@contextmanager
def _translated_memory_errors() -> Iterator[None]:
    """torch's out-of-memory errors, of a GPU or of the CPU's allocator, become ours."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise OutOfMemoryError(_MEMORY) from error
    except RuntimeError as error:
        if "can't allocate memory" not in str(error) and "out of memory" not in str(error):
            raise
        raise OutOfMemoryError(_MEMORY) from error
