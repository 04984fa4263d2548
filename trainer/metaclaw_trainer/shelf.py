"""Where adapters are kept: in the model ("hot") or beside it in plain memory ("paged"); one is active at a time."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from peft import PeftModel

from metaclaw_trainer.adapters import Adapter, AdapterConfig, AdapterState
from metaclaw_trainer.base_model import BaseModel
from metaclaw_trainer.errors import AdapterExistsError, EngineError, TrainerError, UnknownAdapterError
from metaclaw_trainer.fused_lora import FusedLinear

_ADD_UP_FROM = 256  # tokens of a batch from which adding the adapter up pays for itself


class AdapterShelf:
    """The adapters of one base model. Not for use by several threads."""

    def __init__(self, base: BaseModel, base_name: str, max_hot: int) -> None:
        self.hot: dict[str, Adapter] = {}  # least recently used first
        self.paged: dict[str, AdapterState] = {}
        self._base = base
        self._base_name = base_name
        self._max_hot = max_hot
        self._peft: PeftModel | None = None
        self._layers: list[FusedLinear] = []
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
            state = self.paged[key]
            self._inject(key, state.config).load(state)
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
        return self._inject(key, config, seed)

    def drop(self, key: str) -> None:
        """Forget an adapter; nothing happens if there is none."""
        self.paged.pop(key, None)
        if self.hot.pop(key, None) is not None:
            self._eject(key)

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
        self.paged[key] = adapter.state()
        del self.hot[key]
        self._eject(key)

    def state(self, key: str) -> AdapterState:
        """A copy, on the CPU."""
        return self.paged[key] if key in self.paged else self.get(key).state()

    def restore(self, key: str, state: AdapterState) -> None:
        """Put ``state`` in the place of the adapter, or make it; on failure everything is as it was.

        Raises:
            CheckpointRefusedError: if the state does not fit the base model.
        """
        before = self.state(key) if key in self.hot or key in self.paged else None
        self.drop(key)
        try:
            self._inject(key, state.config).load(state)
        except (TrainerError, RuntimeError):
            self.drop(key)
            if before is not None:
                self._inject(key, before.config).load(before)
            raise

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
            for layer in self._layers:
                layer.activate(None if key is None else _inner(key))
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
        for layer in self._layers:
            layer.add_up(None if key is None else _inner(key))
        self._summed = key

    def _inject(self, key: str, config: AdapterConfig, seed: int = 0) -> Adapter:
        self._make_room()
        if missing := [target for target in config.targets if target not in self._base.layer_names]:
            raise EngineError(
                f"the base model has no layer named {', '.join(missing)}; "
                f"targets here: {', '.join(self._base.layer_names)}"
            )
        peft_config = config.to_peft(self._base_name)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            if self._peft is None:
                self._peft = PeftModel(self._base.model, peft_config, adapter_name=_inner(key))
            else:
                self._peft.add_adapter(_inner(key), peft_config)
        names, weights = [], []
        ending = f".{_inner(key)}.weight"
        for name, weight in self._base.model.named_parameters():
            if ".lora_" in name and name.endswith(ending):
                names.append(f"base_model.model.{name.removesuffix(ending)}.weight")
                weights.append(weight.requires_grad_(True))
        adapter = Adapter(config, tuple(names), tuple(weights), torch.optim.AdamW(weights, lr=0.0, foreach=True))
        self.hot[key] = adapter
        self._rewired()
        return adapter

    def _eject(self, key: str) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT makes another adapter the active one; here none is between calls
            cast(Any, self._peft).delete_adapter(_inner(key))
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


def _inner(key: str) -> str:
    """PEFT's name of an adapter: never a part of its own prefix ``lora_``, which it would mistake for one."""
    return f"adapter-{key}"
