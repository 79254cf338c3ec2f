"""The kind of attention: measured once, remembered, kept inside; and the same result either way."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch.nn.attention import SDPBackend

from livery.models.sd1 import SD1
from livery.nouns import Dataset, Photo, Recipe
from livery.train import attention
from livery.train.attention import attending, fastest
from livery.train.batches import Plan
from livery.train.buckets import Framing
from livery.train.cache import Encodings, TensorCache
from livery.tuners.tuner import attach_all, build


def test_it_is_measured_once_and_remembered_and_leaves_no_trace(
    recipe: Recipe,
    dataset: Dataset,
    pixels: Callable[[Photo], Image.Image],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    base = SD1.tiny()
    half = Recipe.model_validate({**recipe.model_dump(), "precision": "bf16"})
    cache = TensorCache(tmp_path / "cache")
    encodings = Encodings(base, cache, pixels, half.pictures, towers_train=False)
    passes: list[str] = []
    once = attention._pass  # pyright: ignore[reportPrivateUsage]

    def counted(*parts: Any) -> None:
        passes.append(parts[2])
        once(*parts)

    monkeypatch.setattr(attention, "_pass", counted)
    attached = attach_all([build(spec) for spec in half.tuners], base)
    try:
        plan = Plan(dataset.split("train"), half, Framing.of(half, base))
        found = fastest(base, plan, encodings, tmp_path / "attention.json")
        assert found in ("fused", "written-out")
        assert sorted(passes) == ["fused"] * 4 + ["written-out"] * 4
        assert fastest(base, plan, encodings, tmp_path / "attention.json") == found
        assert len(passes) == 8
        assert list(json.loads((tmp_path / "attention.json").read_text()).values()) == [found]
        assert all(param.grad is None for param in attached.params.values())
        plain = Plan(dataset.split("train"), recipe, Framing.of(recipe, base))
        assert fastest(base, plain, encodings, tmp_path / "attention.json") == "as usual"
    finally:
        attached.undo()


def test_inside_the_kind_acts_and_afterwards_the_denoiser_is_itself():
    base = SD1.tiny()
    told: list[bool] = []
    layer = next(m for m in base.denoiser.modules() if isinstance(m, torch.nn.Conv2d))
    seen = layer.register_forward_pre_hook(lambda *_: told.append(torch.backends.cuda.flash_sdp_enabled()))
    inputs = (torch.zeros(1, 4, 16, 16), torch.tensor([1]), base.encode_prompts(["x"]))
    with attending(base.denoiser, "written-out"):
        plain = base.predict(*inputs)
    with attending(base.denoiser, "fused"):
        fused = base.predict(*inputs)
    usual = base.predict(*inputs)
    seen.remove()
    assert told == [False, True, torch.backends.cuda.flash_sdp_enabled()]
    assert "forward" not in vars(base.denoiser)
    assert torch.allclose(plain, fused, atol=1e-5)
    assert torch.equal(usual, fused)
    assert attention.BACKENDS["written-out"] == [SDPBackend.MATH]
