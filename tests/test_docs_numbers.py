"""The sizes that pages on families and methods state are those of the true shapes, built without weights."""

import re
from pathlib import Path

import pytest
from torch import nn

from livery import plugins
from livery.models.architectures import architecture, meta_parts

DOCS = Path(__file__).parents[1] / "docs"


def per_rank(part: nn.Module, targets: str) -> tuple[int, int]:
    """Layers that a LoRA adapts by default, and its numbers per unit of rank: inputs and outputs of each."""
    layers = [
        layer
        for name, layer in part.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d) and re.fullmatch(targets, name)
    ]
    return len(layers), sum(layer.weight.shape[0] + layer.weight[0].numel() for layer in layers)


@pytest.mark.parametrize("name", ["sd1.5", "sd2.1", "sdxl", "sd3-medium", "sd3.5-medium", "sd3.5-large"])
def test_sizes_are_those_of_the_true_shapes(name: str) -> None:
    family = architecture(name).family
    page = (DOCS / "families" / f"{family}.md").read_text()
    parts, base = meta_parts(name), plugins.families()[family]
    layers, numbers = per_rank(parts["denoiser"], base.lora_targets)
    assert f"{layers} layers" in page
    assert f"{numbers:,}" in page
    for part, module in parts.items():
        if part != "vae":
            millions = sum(weight.numel() for weight in module.parameters()) / 1e6
            assert f"{millions:,.0f} M" in page, part


@pytest.mark.parametrize("name", ["sd1.5", "sd2.1", "sdxl", "sd3-medium"])
def test_the_page_on_lora_counts_text_encoders_too(name: str) -> None:
    page = (DOCS / "methods" / "lora.md").read_text()
    base = plugins.families()[architecture(name).family]
    for part, module in meta_parts(name).items():
        if part != "vae":
            targets = base.lora_targets if part == "denoiser" else base.tower_targets
            assert f"{per_rank(module, targets)[1]:,}" in page, part
