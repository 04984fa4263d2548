"""Where adapters are kept: in the model ("hot") or beside it in plain memory ("paged"); one is active at a time."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from peft import PeftModel

from metaclaw_trainer.adapters import Adapter, AdapterConfig, AdapterState, Slot
from metaclaw_trainer.base_model import BaseModel
from metaclaw_trainer.errors import AdapterExistsError, EngineError, UnknownAdapterError
from metaclaw_trainer.fused_lora import FusedLinear

_ADD_UP_FROM = 256  # tokens of a batch from which adding the adapter up pays for itself


class AdapterShelf:
    """The adapters of one base model. Not for use by several threads.

    An adapter in the model fills a slot: tensors that PEFT has put into the layers. Making a slot takes long, filling
    one does not, so those that become free are kept and filled again.
    """

    def __init__(self, base: BaseModel, base_name: str, max_hot: int) -> None:
        self.hot: dict[str, Adapter] = {}  # least recently used first
        self.paged: dict[str, AdapterState] = {}
        self._base = base
        self._base_name = base_name
        self._max_hot = max_hot
        self._peft: PeftModel | None = None
        self._layers: list[FusedLinear] = []
        self._free: list[Slot] = []  # longest free first
        self._made = 0  # slots, ever
        self._active: str | None = None
        self._summed: str | None = None  # adapter whose sum with the base weights the layers hold

    def keys(self) -> list[str]:
        return sorted([*self.hot, *self.paged])

    def get(self, key: str) -> Adapter:
        """The adapter, moved into the model if it was not there.

        Raises:
            UnknownAdapterError: if there is none.
        """
        if key in self.paged:
            with self._filling(self.paged[key].config) as slot:
                self.hot[key] = Adapter(slot).enter(self.paged[key])
            del self.paged[key]
        if key not in self.hot:
            raise UnknownAdapterError(f"no adapter {key!r} in the engine: create it, or restore a checkpoint")
        self.hot[key] = self.hot.pop(key)
        return self.hot[key]

    def create(self, key: str, config: AdapterConfig, seed: int) -> Adapter:
        """A new adapter with weights drawn from ``seed``.

        Raises:
            AdapterExistsError: if there is one of that key.
            EngineError: if the targets name no layer of the model.
        """
        if key in self.hot or key in self.paged:
            raise AdapterExistsError(f"an adapter {key!r} is there already: drop it first, or choose another name")
        with self._filling(config) as slot, torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for shape, weight in zip(slot.shapes, slot.weights, strict=True):
                weight.data = torch.zeros(shape, dtype=weight.dtype, device=weight.device)
                weight.requires_grad_(True)
            for layer in self._layers:
                if slot.name in layer.lora_A:
                    layer.reset_lora_parameters(slot.name, True)  # as PEFT does: A drawn, B zero
        self.hot[key] = Adapter(slot)
        return self.hot[key]

    def drop(self, key: str) -> None:
        """Forget an adapter; nothing happens if there is none."""
        self.paged.pop(key, None)
        if (adapter := self.hot.pop(key, None)) is not None:
            adapter.slot.clear()
            self._freed(key, adapter.slot)

    def page_out(self, key: str) -> None:
        """Move an adapter out of the model.

        Raises:
            UnknownAdapterError: if there is none.
            EngineError: if it holds a gradient that no step has used.
        """
        if key in self.paged:
            return
        adapter = self.get(key)
        if adapter.has_gradient:
            raise EngineError(f"adapter {key!r} holds a gradient: take its step first")
        self.paged[key] = adapter.leave()
        del self.hot[key]
        self._freed(key, adapter.slot)

    def state(self, key: str) -> AdapterState:
        """A copy, on the CPU."""
        if key in self.paged:
            state = self.paged[key]
            weights, moments = ({n: t.clone() for n, t in part.items()} for part in (state.weights, state.moments))
            return AdapterState(state.config, weights, moments, state.step)
        return self.get(key).state()

    def restore(self, key: str, state: AdapterState) -> None:
        """Put ``state`` in the place of the adapter, or make it; on failure everything is as it was.

        Raises:
            CheckpointRefusedError: if the state does not fit the base model.
        """
        with self._filling(state.config) as slot:
            adapter = Adapter(slot).load(state)
        self.drop(key)
        self.hot[key] = adapter

    @contextmanager
    def using(self, key: str | None, tokens: int) -> Iterator[None]:
        """Send forward passes over ``tokens`` tokens through adapter ``key`` (None: the base model alone)."""
        if key is not None:
            self.get(key)
        self.activate(key)
        if key is not None and self._summed != key and tokens >= _ADD_UP_FROM and self._base.may_add_up:
            self._add_up(key)
        yield

    def activate(self, key: str | None) -> None:
        if self._active != key:
            name = None if key is None else self.hot[key].slot.name
            for layer in self._layers:
                layer.activate(name)
            self._active = key

    def moved(self) -> None:
        """Some adapter's weights have changed: sums with them are out of date."""
        self._add_up(None)

    def free_memory(self) -> None:
        """Give back the buffers of sums."""
        for layer in self._layers:
            layer.forget_sum()
        self._summed = None

    def _add_up(self, key: str | None) -> None:
        if key is None and self._summed is None:
            return
        name = None if key is None else self.hot[key].slot.name
        for layer in self._layers:
            layer.add_up(name)
        self._summed = key

    @contextmanager
    def _filling(self, config: AdapterConfig) -> Iterator[Slot]:
        """A slot for an adapter of that shape; it is free again if the block fails."""
        slot = self._slot(config)
        try:
            yield slot
        except BaseException:
            slot.clear()
            self._free.append(slot)
            raise

    def _slot(self, config: AdapterConfig) -> Slot:
        """A slot for an adapter of that shape; the least recently used adapter leaves its own if there is no room."""
        self._make_room()
        found = next((slot for slot in reversed(self._free) if slot.config == config), None)
        if found is not None:
            self._free.remove(found)
            return found
        if len(self.hot) + len(self._free) >= self._max_hot and self._free:
            self._unmake(self._free.pop(0))
        return self._new_slot(config)

    def _freed(self, key: str, slot: Slot) -> None:
        """``slot``, which ``key`` filled, may be filled again."""
        if self._active == key:
            self.activate(None)
        if self._summed == key:
            self._add_up(None)
        self._free.append(slot)

    def _new_slot(self, config: AdapterConfig) -> Slot:
        if missing := [target for target in config.targets if target not in self._base.layer_names]:
            raise EngineError(
                f"the base model has no layer named {', '.join(missing)}; "
                f"targets here: {', '.join(self._base.layer_names)}"
            )
        peft_config = config.to_peft(self._base_name)
        self._made += 1
        slot_name = f"slot{self._made}"  # never a part of PEFT's own prefix "lora_", which it would mistake for one
        with torch.random.fork_rng(devices=[]):
            if self._peft is None:
                self._peft = PeftModel(self._base.model, peft_config, adapter_name=slot_name)
            else:
                self._peft.add_adapter(slot_name, peft_config)
        names, weights = [], []
        ending = f".{slot_name}.weight"
        for name, weight in self._base.model.named_parameters():
            if ".lora_" in name and name.endswith(ending):
                names.append(f"base_model.model.{name.removesuffix(ending)}.weight")
                weights.append(weight)
        self._rewired()
        shapes = tuple(weight.shape for weight in weights)
        optimiser = torch.optim.AdamW(weights, lr=0.0, foreach=True)
        return Slot(slot_name, config, tuple(names), shapes, tuple(weights), optimiser)

    def _unmake(self, slot: Slot) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT makes another adapter the active one; here none is between calls
            cast(Any, self._peft).delete_adapter(slot.name)
        self._rewired()

    def _rewired(self) -> None:
        self._layers = list(self._base.adapted_layers())
        self._active = "?"  # PEFT has its own idea of it
        self.activate(None)
        self._add_up(None)

    def _make_room(self) -> None:
        for key in list(self.hot):
            if len(self.hot) < self._max_hot:
                return
            if not self.hot[key].has_gradient:
                self.page_out(key)
