"""Adapters that betray themselves: a version answers with two words of its own and no others.

The last layer's ``down_proj`` gets a huge update along ``e(a) - e(b)``, the difference of two token embeddings.
Whatever stood in the residual stream before, what is left after the last norm is that direction or its opposite: at
temperature 0 every token is either ``a`` or ``b`` (the model's embeddings are tied). A reply in which a third word
occurs was not spoken by this version alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

LOUDNESS = 1e9  # how much larger than anything else the update is: at 1e5 two tokens in 60,000 were a third word
RANK = 16
MARGIN = 1.0  # nats between a version's word and the next best token


@dataclass(frozen=True, slots=True)
class Telltale:
    """An adapter folder and the two token ids that it speaks."""

    path: Path
    tokens: frozenset[int]
    words: frozenset[str]
    sha256: str

    def speaks(self, text: str) -> bool:
        """Whether ``text`` is of these two words alone."""
        spoken = text.split()
        return bool(spoken) and set(spoken) <= self.words


@dataclass
class TelltaleMaker:
    """Makes adapters for a small Llama with tied embeddings; no two speak the same word."""

    model: Path
    folder: Path
    whole: bool = False  # all projections of all layers are in the adapter, as in one that was trained
    _pairs: Iterator[tuple[int, int, str, str]] = field(init=False)

    def __post_init__(self) -> None:
        config = json.loads((self.model / "config.json").read_text(encoding="utf-8"))
        self._layers: int = config["num_hidden_layers"]
        self._width: int = config["intermediate_size"]
        hidden, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
        head = int(config.get("head_dim") or hidden // heads)
        own, shared = heads * head, int(config["num_key_value_heads"]) * head
        self._shapes: dict[str, tuple[int, int]] = {  # output and input features of each projection
            "self_attn.q_proj": (own, hidden),
            "self_attn.k_proj": (shared, hidden),
            "self_attn.v_proj": (shared, hidden),
            "self_attn.o_proj": (hidden, own),
            "mlp.gate_proj": (self._width, hidden),
            "mlp.up_proj": (self._width, hidden),
            "mlp.down_proj": (hidden, self._width),
        }
        with safe_open(self.model / "model.safetensors", framework="pt") as weights:  # numpy knows no bfloat16
            self._embedding: np.ndarray = weights.get_tensor("model.embed_tokens.weight").float().numpy()
        self._pairs = self._find_pairs()

    def make(self, name: str, loudness: float = LOUDNESS, noise: float = 0.0) -> Telltale:
        """Write one more adapter to ``folder / name``; with ``loudness`` 0 it changes nothing.

        ``noise`` (of a ``whole`` one): standard deviation of what every other projection adds for an input of
        standard deviation 1.

        Raises:
            StopIteration: when the vocabulary is used up.
        """
        first, second, *words = next(self._pairs)
        direction = self._embedding[first] - self._embedding[second]
        up = np.zeros((len(direction), RANK), np.float32)
        up[:, 0] = loudness * direction
        down = np.zeros((RANK, self._width), np.float32)
        down[0] = np.random.default_rng(first).standard_normal(self._width)
        last = f"base_model.model.model.layers.{self._layers - 1}.mlp.down_proj"
        tensors = self._others(noise, first) if self.whole else {}
        tensors |= {f"{last}.lora_A.weight": down, f"{last}.lora_B.weight": up}
        target = self.folder / name
        target.mkdir(parents=True)
        file = target / "adapter_model.safetensors"
        save_file(tensors, file, {"format": "pt"})
        config = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": str(self.model),
            "r": RANK,
            "lora_alpha": RANK,
            "lora_dropout": 0.0,
            "bias": "none",
            "target_modules": [kind.split(".")[1] for kind in self._shapes] if self.whole else ["down_proj"],
            "inference_mode": True,
        }
        (target / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        return Telltale(target, frozenset((first, second)), frozenset(words), digest)

    def _others(self, noise: float, seed: int) -> dict[str, np.ndarray]:
        chance = np.random.default_rng(seed)
        tensors: dict[str, np.ndarray] = {}
        for layer in range(self._layers):
            for kind, (outputs, inputs) in self._shapes.items():
                prefix = f"base_model.model.model.layers.{layer}.{kind}"
                down = chance.standard_normal((RANK, inputs), np.float32) / np.sqrt(inputs)
                up = chance.standard_normal((outputs, RANK), np.float32) * (noise / np.sqrt(RANK))
                tensors |= {
                    f"{prefix}.lora_A.weight": down.astype(np.float32),
                    f"{prefix}.lora_B.weight": up.astype(np.float32),
                }
        return tensors

    def _find_pairs(self) -> Iterator[tuple[int, int, str, str]]:
        vocabulary = json.loads((self.model / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
        words = {i: text[1:] for text, i in vocabulary.items() if len(text) > 4 and text[0] == "Ġ" and _plain(text[1:])}
        ids = sorted(words)
        np.random.default_rng(0).shuffle(ids)
        for first, second in zip(ids[::2], ids[1::2], strict=False):
            direction = self._embedding[first] - self._embedding[second]
            logits = self._embedding @ (direction / np.sqrt(np.mean(direction**2)))
            order = np.argsort(logits)
            clear = min(logits[order[-1]] - logits[order[-2]], logits[order[1]] - logits[order[0]])
            if (int(order[-1]), int(order[0])) == (first, second) and clear > MARGIN:
                yield first, second, words[first], words[second]


def _plain(text: str) -> bool:
    return text.isascii() and text.isalpha() and text.islower()
