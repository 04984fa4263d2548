"""The frozen base model: loaded once, identified, never changed."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from metaclaw_trainer.errors import ModelLoadError
from metaclaw_trainer.forward import unsupported_head
from metaclaw_trainer.fused_lora import FusedLinear
from metaclaw_trainer.fused_norm import fuse_norms
from metaclaw_trainer.settings import TrainerSettings

log = logging.getLogger(__name__)

_PROBES = 64  # values of each tensor that go into the fingerprint


@dataclass(slots=True)
class BaseModel:
    """A causal language model of transformers without a trainable parameter."""

    model: Any
    device: torch.device
    vocabulary: int
    layer_names: tuple[str, ...]  # what an adapter may name as target
    fingerprint: str
    may_add_up: bool = False  # adapters may be added to a copy of the weights without being rounded away
    _recomputed: list[nn.Module] = field(default_factory=list)

    def adapted_layers(self) -> Iterator[FusedLinear]:
        return (layer for layer in self.model.modules() if isinstance(layer, FusedLinear))

    def recompute_activations(self, on: bool) -> None:
        """Whether the next forward passes drop activations and compute them again for the gradient.

        Only the switch of the decoder layers is set: the model itself stays in evaluation mode, without dropout.
        The variant that needs no gradient at the embeddings is used, so nothing else becomes trainable.
        """
        if on and not self._recomputed:
            self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            self._recomputed = [m for m in self.model.modules() if getattr(m, "gradient_checkpointing", False) is True]
        for layer in self._recomputed:
            layer.training = on


def load_base(settings: TrainerSettings) -> BaseModel:
    """Load and freeze the base model of ``settings``.

    Raises:
        ModelLoadError: if there is none, or it has a head that the trainer does not compute.
    """
    if not settings.base_model:
        raise ModelLoadError("no base model: set metaclaw.base_model to a folder or a name on the model hub")
    device = choose_device(settings.device)
    dtype = choose_dtype(settings.dtype, device)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            settings.base_model, dtype=dtype, trust_remote_code=settings.trust_remote_code, use_safetensors=True
        )
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelLoadError(
            f"cannot load the base model {settings.base_model}: {first}; it must be a folder with config.json and "
            "safetensors, or a name on the model hub"
        ) from error
    base = adopt(model, settings.base_model, device, dtype)
    log.info("base model loaded: %s, %s on %s, fingerprint %s", settings.base_model, dtype, device, base.fingerprint)
    return base


def adopt(model: Any, name: str, device: torch.device, dtype: torch.dtype) -> BaseModel:
    """Freeze a model that is in memory already, and move it to ``device``.

    Raises:
        ModelLoadError: if it has a head that the trainer does not compute.
    """
    if reason := unsupported_head(model):
        raise ModelLoadError(f"the base model {name} cannot be trained here: {reason}")
    model.requires_grad_(False).eval().to(device)
    plain = device.type == "cpu" and dtype == torch.float32
    if plain:
        fuse_norms(model)
    return BaseModel(
        model=model,
        device=device,
        vocabulary=int(model.get_input_embeddings().weight.shape[0]),
        layer_names=_linear_names(model),
        fingerprint=fingerprint(model),
        may_add_up=plain,
    )


def choose_device(name: str) -> torch.device:
    """``auto``: the first GPU, else the CPU. The environment is never touched.

    Raises:
        ModelLoadError: if that GPU is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ModelLoadError(
            f"device {name} is not there ({torch.cuda.device_count()} GPUs seen): "
            "set metaclaw.trainer.device to cpu or auto"
        )
    return device


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """``auto``: bfloat16 on a GPU, float32 on a CPU (where bfloat16 was 2.6 times slower)."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]


def fingerprint(model: nn.Module) -> str:
    """16 hex digits that name the weights: names, shapes and evenly spaced values; in bfloat16, so that types agree."""
    digest = hashlib.sha256()
    for name, weight in sorted(model.named_parameters()):
        if ".lora_" in name:
            continue
        flat = weight.detach().reshape(-1)
        probes = flat[:: max(1, flat.numel() // _PROBES)][:_PROBES].to(torch.bfloat16).cpu()
        digest.update(f"{name.replace('.base_layer.', '.')}{tuple(weight.shape)}".encode())
        digest.update(probes.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]


def _linear_names(model: Any) -> tuple[str, ...]:
    head = model.get_output_embeddings()
    names = {name.rsplit(".", 1)[-1] for name, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head}
    return tuple(sorted(names))
