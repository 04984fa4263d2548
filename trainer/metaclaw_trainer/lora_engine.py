"""The model's only owner: one frozen base, any number of adapters by key, forward, backward, step.

Every method belongs to the thread that made the engine (see ``engine_thread``); another one is refused. A gradient
accumulates over calls of ``forward_backward`` until ``optim_step`` uses it up.
"""

from __future__ import annotations

import logging
import math
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor

from metaclaw_trainer.adapters import Adapter, AdapterConfig, AdapterState, OptimiserOptions
from metaclaw_trainer.base_model import BaseModel, load_base
from metaclaw_trainer.batching import Datum, check_datum, micro_batches
from metaclaw_trainer.errors import (
    AdapterExistsError,
    EngineError,
    NonFiniteError,
    OutOfMemoryError,
    TrainerError,
    UnknownAdapterError,
    WrongThreadError,
)
from metaclaw_trainer.forward import Scored, score
from metaclaw_trainer.fused_lora import FusedLinear
from metaclaw_trainer.losses import BUILT_IN, Loss, LossOptions, find_loss, token_weights
from metaclaw_trainer.objective import BatchResult, Tally, objective
from metaclaw_trainer.settings import TrainerSettings

log = logging.getLogger(__name__)

_MEMORY = (
    "out of memory in a forward or backward pass; no step was taken. Lower micro_batch_tokens or max_sample_tokens, "
    "or set gradient_checkpointing: true"
)


class LoraEngine:
    """One base model with its adapters."""

    def __init__(self, settings: TrainerSettings) -> None:
        """Load the base model.

        Raises:
            ModelLoadError: if that fails.
        """
        self._owner = threading.get_ident()
        self.settings = settings
        self.base: BaseModel = load_base(settings)
        self.losses: dict[str, Loss] = dict(BUILT_IN)
        self._peft: PeftModel | None = None
        self._hot: dict[str, Adapter] = {}
        self._paged: dict[str, AdapterState] = {}
        self._layers: list[FusedLinear] = []
        self._active: str | None = None

    # adapters in and out

    def adapters(self) -> list[str]:
        """Keys of all adapters, paged out or not."""
        return sorted([*self._hot, *self._paged])

    def create(self, key: str, config: AdapterConfig | None = None, seed: int = 0) -> int:
        """A new adapter that changes nothing yet (B is 0); returns its number of parameters.

        Raises:
            AdapterExistsError: if there is one of that key.
            EngineError: if the targets name no layer of the model.
        """
        self._mine()
        if key in self._hot or key in self._paged:
            raise AdapterExistsError(f"an adapter {key!r} is there already: drop it first, or choose another name")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            adapter = self._inject(key, config or AdapterConfig.of(self.settings))
        return sum(weight.numel() for weight in adapter.weights)

    def drop(self, key: str) -> None:
        """Forget an adapter, gradient and optimiser included; nothing happens if there is none."""
        self._mine()
        self._paged.pop(key, None)
        if self._hot.pop(key, None) is not None:
            self._eject(key)

    def page_out(self, key: str) -> None:
        """Move an adapter out of the model into plain memory; it comes back by itself when it is used.

        Raises:
            UnknownAdapterError: if there is none.
            EngineError: if it holds a gradient that no step has used.
        """
        self._mine()
        if key in self._paged:
            return
        adapter = self._adapter(key)
        if any(weight.grad is not None for weight in adapter.weights):
            raise EngineError(f"adapter {key!r} holds a gradient: take its step first")
        self._paged[key] = adapter.state()
        del self._hot[key]
        self._eject(key)

    def page_in(self, key: str) -> None:
        """Move an adapter back into the model.

        Raises:
            UnknownAdapterError: if there is none.
        """
        self._mine()
        self._adapter(key)

    def state(self, key: str) -> AdapterState:
        """A copy of weights and optimiser, on the CPU."""
        self._mine()
        return self._paged[key] if key in self._paged else self._adapter(key).state()

    def restore(self, key: str, state: AdapterState) -> None:
        """Put ``state`` in the place of the adapter ``key``, or make it; on failure everything is as it was.

        Raises:
            CheckpointRefusedError: if the state does not fit the base model.
        """
        self._mine()
        before = self.state(key) if key in self._hot or key in self._paged else None
        self.drop(key)
        try:
            self._inject(key, state.config).load(state)
        except (TrainerError, RuntimeError):
            self.drop(key)
            if before is not None:
                self._inject(key, before.config).load(before)
            raise

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

        If it fails, the gradient is as it was before the call, except for ``OutOfMemoryError`` and ``NonFiniteError``,
        which leave none at all.

        Raises:
            UnknownAdapterError, UnknownLossError, InvalidDatumError: before anything is computed.
            NonFiniteError: if the loss is NaN or infinite.
            OutOfMemoryError: if the device has too little memory.
        """
        self._mine()
        function = find_loss(loss or self.settings.loss, self.losses)
        options = options or LossOptions.of(self.settings)
        for datum in datums:
            check_datum(datum, self.base.vocabulary, self.settings.max_sample_tokens)
        adapter = self._adapter(key)
        weights = token_weights([datum.predicted for datum in datums], options)
        tally = Tally(datums)
        with self._using(key), self._or_clear(adapter):
            for group in micro_batches(datums, self.settings.micro_batch_tokens):
                scored = self._score([datums[i] for i in group], differentiate=True)
                objective(group, scored, weights, function, options, tally).backward()  # type: ignore[no-untyped-call]
        return tally.result()

    def logprobs(self, key: str | None, datums: Sequence[Datum]) -> list[Tensor]:
        """Log-probabilities [N] of each datum's targets under adapter ``key``, or under the base model (None)."""
        self._mine()
        for datum in datums:
            check_datum(datum, self.base.vocabulary, self.settings.max_sample_tokens)
        found: list[Tensor] = [torch.empty(0)] * len(datums)
        if key is not None:
            self._adapter(key)
        with torch.no_grad(), self._using(key), _translated_memory_errors():
            for group in micro_batches(datums, self.settings.micro_batch_tokens):
                for index, one in zip(group, self._score([datums[i] for i in group]), strict=True):
                    found[index] = one.logprobs_N.cpu()
        return found

    def zero_grad(self, key: str) -> None:
        """Forget the accumulated gradient."""
        self._mine()
        self._adapter(key).clear_gradient()

    def optim_step(self, key: str, options: OptimiserOptions) -> dict[str, float]:
        """One AdamW step on the accumulated gradient, which is then used up.

        Raises:
            NonFiniteError: if the gradient is NaN or infinite; the weights are as they were.
            EngineError: if there is no gradient.
        """
        self._mine()
        adapter = self._adapter(key)
        if all(weight.grad is None for weight in adapter.weights):
            raise EngineError(f"adapter {key!r} has no gradient: call forward_backward before optim_step")
        norm = adapter.apply(options)
        if not math.isfinite(norm):
            raise NonFiniteError(
                f"the gradient of {key!r} is {norm}: no step was taken; look for a reward or learning "
                "rate that is far too large"
            )
        return {"grad_norm": norm, "learning_rate": options.learning_rate, "step": float(adapter.step)}

    # inside

    def _score(self, datums: Sequence[Datum], differentiate: bool = False) -> list[Scored]:
        mode, longest = self.settings.gradient_checkpointing, max(datum.length for datum in datums)
        wanted = longest > self.settings.checkpoint_above_tokens if mode == "auto" else mode
        self.base.recompute_activations(differentiate and wanted)
        return score(self.base.model, datums, self.base.device)

    def _mine(self) -> None:
        if threading.get_ident() != self._owner:
            raise WrongThreadError("the model belongs to another thread: go through EngineThread.submit")

    def _adapter(self, key: str) -> Adapter:
        if key in self._paged:
            state = self._paged[key]
            self._inject(key, state.config).load(state)
            del self._paged[key]
        if key not in self._hot:
            raise UnknownAdapterError(f"no adapter {key!r} in the engine: create it, or restore a checkpoint")
        self._hot[key] = self._hot.pop(key)  # most recently used last
        return self._hot[key]

    def _inject(self, key: str, config: AdapterConfig) -> Adapter:
        self._make_room()
        if missing := [t for t in config.targets if t not in self.base.layer_names]:
            raise EngineError(
                f"the base model has no layer named {', '.join(missing)}; "
                f"targets here: {', '.join(self.base.layer_names)}"
            )
        peft_config = config.to_peft(self.settings.base_model)
        if self._peft is None:
            self._peft = PeftModel(self.base.model, peft_config, adapter_name=_inner(key))
        else:
            self._peft.add_adapter(_inner(key), peft_config)
        names, weights = [], []
        ending = f".{_inner(key)}.weight"
        for name, weight in self.base.model.named_parameters():
            if ".lora_" in name and name.endswith(ending):
                names.append(f"base_model.model.{name.removesuffix(ending)}.weight")
                weights.append(weight.requires_grad_(True))
        optimiser = torch.optim.AdamW(weights, lr=0.0, foreach=True)
        adapter = Adapter(config, tuple(names), tuple(weights), optimiser)
        self._hot[key] = adapter
        self._layers = list(self.base.adapted_layers())
        self._activate(None)
        return adapter

    def _make_room(self) -> None:
        for key in list(self._hot):
            if len(self._hot) < self.settings.max_hot_adapters:
                return
            if all(weight.grad is None for weight in self._hot[key].weights):
                self.page_out(key)

    def _eject(self, key: str) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT makes another adapter the active one; here none is between calls
            cast(Any, self._peft).delete_adapter(_inner(key))
        self._activate(None)

    def _activate(self, key: str | None) -> None:
        for layer in self._layers:
            layer.activate(None if key is None else _inner(key))
        self._active = key

    @contextmanager
    def _using(self, key: str | None) -> Iterator[None]:
        if self._active != key:
            self._activate(key)
        yield

    @contextmanager
    def _or_clear(self, adapter: Adapter) -> Iterator[None]:
        try:
            with _translated_memory_errors():
                yield
        except (OutOfMemoryError, NonFiniteError):
            adapter.clear_gradient()
            raise


def _inner(key: str) -> str:
    """PEFT's name of an adapter: never a part of its own prefix ``lora_``, which it would mistake for one."""
    return f"adapter-{key}"


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
