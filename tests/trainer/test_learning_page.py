"""docs/learning.md says what the code does: names of settings, defaults, losses, metrics."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from metaclaw_trainer.losses import BUILT_IN
from metaclaw_trainer.settings import TrainerSettings

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "learning.md").read_text(encoding="utf-8")


def test_every_loss_has_its_row_and_every_row_its_loss() -> None:
    rows = set(re.findall(r"^\| `(\w+)` \|", PAGE, flags=re.MULTILINE)) - {"loss"}
    assert rows == set(BUILT_IN)


def test_every_estimator_and_normalisation_is_described() -> None:
    for name in ("advantage", "normalisation", "advantage_scale"):
        choices = TrainerSettings.model_fields[name].annotation.__args__  # type: ignore[union-attr]
        missing = [
            choice for choice in choices if choice != "none" and f"`{choice}`" not in PAGE and choice not in PAGE
        ]
        assert not missing


@pytest.mark.parametrize(
    ("text", "name"),
    [
        (r"`importance_cap` (\d+)", "importance_cap"),
        (r"`baseline_memory` \((\d+)\)", "baseline_memory"),
        (r"`baseline_prior` \((\d+)\)", "baseline_prior"),
        (r"samples \((\d+) by default\)", "batch_size"),
    ],
)
def test_defaults_on_the_page_are_the_settings_defaults(text: str, name: str) -> None:
    found = re.search(text, PAGE)
    assert found is not None
    assert float(found[1]) == float(TrainerSettings.model_fields[name].default)


def test_bounds_on_the_page_are_the_settings_defaults() -> None:
    for name in ("ppo_clip", "cispo_clip"):
        found = re.search(rf"`{name}` ([\d.]+), ([\d.]+)", PAGE)
        assert found is not None
        assert (float(found[1]), float(found[2])) == TrainerSettings.model_fields[name].default


def test_every_setting_that_the_page_names_exists() -> None:
    sources = Path(__file__).resolve().parents[2] / "trainer" / "metaclaw_trainer"
    code = "\n".join(path.read_text(encoding="utf-8") for path in sources.glob("*.py"))
    for name in set(re.findall(r"`([a-z]+_[a-z_]+)`", PAGE)):
        if name.startswith("kl_") and f'Pull("{name[3:]}"' in code:
            continue
        assert name in TrainerSettings.model_fields or re.search(rf"\b{name}\b", code), name
