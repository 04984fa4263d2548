"""Are the answers still answers? Judged by the base model's own likelihood of them, and by repetition.

The base model is asked apart from the system, after it has ended: vLLM's CPU build (0.32) dies when it is asked for
``prompt_logprobs`` while adapters are enabled.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any


def distinct2(texts: Sequence[str]) -> float:
    """Share of word pairs that are different ones, over all texts together (Li et al. 2016); 1.0: none comes twice."""
    pairs = [pair for text in texts for pair in pairwise(text.lower().split())]
    return len(set(pairs)) / len(pairs) if pairs else 0.0


class BaseModel:
    """The base model in float32 on the CPU, for scoring texts."""

    def __init__(self, path: Path) -> None:
        # Threads that wait for one another without computing cost most where something else runs beside them.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging

        logging.disable_progress_bar()
        self._tokenizer: Any = AutoTokenizer.from_pretrained(path)
        self._model: Any = AutoModelForCausalLM.from_pretrained(path, dtype="float32").eval()

    def log_likelihood(self, exchanges: Sequence[tuple[str, str]], on_scored: Callable[[], None]) -> float:
        """Mean log-likelihood per token, in nats, over all tokens of all answers; ``exchanges``: (question, answer)."""
        values: list[float] = []
        for question, answer in exchanges:
            values += self._score(question, answer)
            on_scored()
        return sum(values) / len(values)

    def _score(self, question: str, answer: str) -> list[float]:
        import torch

        messages = [{"role": "user", "content": question}]
        text = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        prompt = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        reply = self._tokenizer(answer, add_special_tokens=False)["input_ids"]
        if not reply:
            return []
        with torch.inference_mode():
            logits = self._model(torch.tensor([prompt + reply])).logits[0, len(prompt) - 1 : -1]
        picked = logits.log_softmax(-1).gather(1, torch.tensor(reply)[:, None])[:, 0]
        scores: list[float] = picked.tolist()
        return scores
