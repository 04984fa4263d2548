"""Why a process died: the last meaningful line of its log, and what to do about it."""

from __future__ import annotations

import re
from pathlib import Path

TAIL = 65536  # bytes of a log that are read

# What a log says, and the remedy. The log is searched from its end; the first that matches wins.
REMEDIES: tuple[tuple[str, str], ...] = (
    (r"address already in use|Errno 98|Errno 48", "another program has the port; stop it or choose another port"),
    (
        r"CUDA out of memory|torch\.OutOfMemoryError|"
        r"Free memory on device .* is less than",
        "the GPU is too full: lower metaclaw.vllm.gpu_memory or metaclaw.vllm.max_model_len",
    ),
    (
        r"is less than desired CPU memory utilization",
        "too little memory: give metaclaw.vllm.extra_args --gpu-memory-utilization=0.3, which counts for the CPU too",
    ),
    (
        r"MemoryError|Cannot allocate memory|Not enough memory",
        "too little memory: lower metaclaw.vllm.kv_cache_gib or take a smaller model",
    ),
    (r"No space left on device", "the disk is full: free some space"),
    (
        r"No available memory for the cache blocks|KV cache is needed, which is larger",
        "lower metaclaw.vllm.max_model_len, or raise metaclaw.vllm.gpu_memory (without a GPU: kv_cache_gib)",
    ),
    (r"greater than the derived max_model_len", "lower metaclaw.vllm.max_model_len"),
    (
        r"is not a valid model identifier|LocalEntryNotFoundError|couldn't connect to|Cannot find any model weights",
        "check metaclaw.base_model: a folder with config.json and *.safetensors, or a hub name within reach",
    ),
    (
        r"SafetensorError|HeaderTooLarge|InvalidHeaderDeserialization|MetadataIncompleteBuffer",
        "the model's weights are damaged: fetch them again",
    ),
    (r"torchvision::nms does not exist", "run: pip uninstall -y torchvision torchaudio torchcodec"),
    (r"No module named '?(litellm|sqlalchemy|bm25s)", "pip install 'metaclaw-plugin[gateway]'"),
    (r"No module named '?(torch|transformers|peft)", "pip install 'metaclaw-plugin[trainer]'"),
    (r"invalid tool call parser", "check metaclaw.vllm.tool_call_parser"),
    (r"error: (unrecognized arguments|argument )", "check metaclaw.vllm.extra_args"),
    (r"Permission denied|Read-only file system", "make METACLAW_HOME writable for this user"),
)

_ERROR = re.compile(r"^(?:[\w.]*(?:Error|Exception)\b|metaclaw[\w ]*: |[\w.]+: error: |cannot start )")
# "(EngineCore pid=17) ERROR 11-22 16:04:40 [core.py:12] " before what is said.
_PREFIX = re.compile(
    r"^(?:\([^)]*\)\s*)*(?:(?:ERROR|CRITICAL|INFO|WARNING|DEBUG):?\s+[\d:. -]*)?(?:\[[^\]]+:\d+\]\s?)?"
)
_NOISE = re.compile(
    r"^\s|^[\^~ ]*$|^Traceback \(most recent call last\)|resource_tracker|See root cause above|destroy_process_group|"
    r"nanobind"
)


def read_tail(log: Path, start: int = 0, size: int = TAIL) -> str:
    """The last ``size`` bytes of ``log`` after offset ``start``; empty if there is none."""
    try:
        with log.open("rb") as file:
            end = file.seek(0, 2)
            file.seek(max(start, end - size))
            return file.read().decode("utf-8", errors="replace")
    except FileNotFoundError:
        return ""


def explain(text: str) -> str:
    """One line for a log's end: its last meaningful line, then the remedy if one is known."""
    lines = meaningful(text)
    if not lines:
        return "it wrote nothing"
    # Also in indented lines: pydantic, for one, says there what was wrong.
    for line in reversed([_PREFIX.sub("", line).strip() for line in text.splitlines()]):
        for pattern, remedy in REMEDIES:
            if re.search(pattern, line):
                return f"{_short(line)}; {remedy}"
    errors = [line for line in lines if _ERROR.match(line)]
    return _short(errors[-1] if errors else lines[-1])


def meaningful(text: str) -> list[str]:
    """The lines that say something, without the log's own prefixes."""
    lines = (_PREFIX.sub("", line).rstrip() for line in text.splitlines())
    return [line for line in lines if not _NOISE.search(line)]


def _short(line: str, limit: int = 300) -> str:
    line = " ".join(line.split())
    return line if len(line) <= limit else line[: limit - 3] + "..."
