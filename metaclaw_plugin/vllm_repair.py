"""A plugin that vLLM itself loads (entry-point group ``vllm.general_plugins``), in each of its processes.

On a machine without a GPU it puts ``metaclaw_plugin.vllm_lora`` in the place of vLLM's own LoRA operations, which are
wrong for the base model in a batch that is mixed with adapters, and slow. Other builds are left as they are.
"""

from __future__ import annotations

import logging

logger = logging.getLogger(__name__)

VLLMS = "vllm.lora.punica_wrapper.punica_cpu.PunicaWrapperCPU"
OURS = "metaclaw_plugin.vllm_lora.GroupedLora"


def repair() -> None:
    """Repair this process's vLLM; a second call changes nothing."""
    try:
        from vllm.platforms.cpu import CpuPlatform
    except ImportError:
        logger.info("this vLLM has no platform for CPUs: nothing to repair")
        return
    if CpuPlatform.get_punica_wrapper() == VLLMS:
        CpuPlatform.get_punica_wrapper = classmethod(lambda _: OURS)
    elif CpuPlatform.get_punica_wrapper() != OURS:
        logger.warning("this vLLM has other LoRA operations for CPUs than were repaired; they are left as they are")
