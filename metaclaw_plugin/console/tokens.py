"""The tokens of an answer, each with how likely the model found it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

MOST = 2_000  # tokens of an answer that are shown
# Probabilities below which a token gets the next darker tint; natural logarithms of 0.9, 0.5, 0.2, 0.05 and 0.01.
STEPS = (-0.105, -0.693, -1.609, -2.996, -4.605)


@dataclass(frozen=True, slots=True)
class Tinted:
    """A stretch of text that came with one token, or with several when they share a character."""

    text: str
    logprob: float  # of the stretch: the sum over its tokens
    tint: int  # 0: nearly sure, up to len(STEPS): most unlikely


class Tokens:
    """Turns token ids into text with the base model's tokenizer, if that can be had on this machine."""

    def __init__(self, base_model: str | None) -> None:
        self._base_model = base_model
        self._lock = threading.Lock()
        self._looked = False
        self._tokenizer: Any = None

    def tinted(self, ids: Sequence[int], logprobs: Sequence[float]) -> list[Tinted] | None:
        """The answer in stretches, at most ``MOST`` tokens of it; ``None`` without a tokenizer."""
        tokenizer = self._load()
        if tokenizer is None:
            return None
        from tokenizers.decoders import DecodeStream

        stream = DecodeStream(skip_special_tokens=False)
        found: list[Tinted] = []
        pending = 0.0
        for token, logprob in zip(ids[:MOST], logprobs[:MOST], strict=True):
            pending += logprob
            text = stream.step(tokenizer, token)
            if text is None:  # half a character: the rest comes with the next token
                continue
            found.append(Tinted(text, pending, tint(pending)))
            pending = 0.0
        return found

    def _load(self) -> Any:
        with self._lock:
            if not self._looked:
                self._looked = True
                self._tokenizer = self._find()
            return self._tokenizer

    def _find(self) -> Any:
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError
        from tokenizers import Tokenizer

        if self._base_model is None:
            return None
        path = Path(self._base_model).expanduser() / "tokenizer.json"
        if not path.is_file():
            try:
                cached = try_to_load_from_cache(self._base_model, "tokenizer.json")
            except HFValidationError:
                return None
            if not isinstance(cached, str):
                return None
            path = Path(cached)
        try:
            return Tokenizer.from_file(str(path))
        except Exception as error:  # noqa: BLE001 - the library raises bare Exception for a file that it cannot read
            logger.warning("the tokenizer %s cannot be read, so tokens are shown without their text: %s", path, error)
            return None


def tint(logprob: float) -> int:
    """0 for a token that was nearly sure, rising as it was less likely."""
    return sum(logprob < step for step in STEPS)
