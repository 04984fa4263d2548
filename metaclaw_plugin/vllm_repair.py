"""A plugin that vLLM itself loads (entry-point group ``vllm.general_plugins``), in each of its processes.

vLLM's LoRA operations for machines without a GPU (0.32, ``lora/ops/torch_ops``) mark a token of the base model by the
slot -1 and then index the adapters with it, which is the last slot: in a batch that is mixed with adapters' tokens, the
base model answers with whatever adapter lies there. The repair makes such rows zero between the two halves of the
operation, so that nothing is added to them. It changes no other row, and does nothing once vLLM does it itself.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

logger = logging.getLogger(__name__)

_DONE = "_metaclaw_repaired"


def repair() -> None:
    """Repair this process's vLLM; a second call changes nothing."""
    try:
        from vllm.lora.ops.torch_ops import lora_ops
    except ImportError:
        logger.info("vLLM has no LoRA operations in torch here: nothing to repair")
        return
    shrink = lora_ops.bgmv_shrink
    if getattr(shrink, _DONE, False):
        return

    @functools.wraps(shrink)
    def repaired(inputs: Any, weights: Any, output: Any, slots: Any, *rest: Any, **named: Any) -> None:
        shrink(inputs, weights, output, slots, *rest, **named)
        output[: slots.shape[0]].masked_fill_((slots < 0).unsqueeze(-1), 0)

    setattr(repaired, _DONE, True)
    lora_ops.bgmv_shrink = repaired
