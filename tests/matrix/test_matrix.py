"""Every family x every tuner keeps every promise. A new family or tuner is one line here.

On tiny models with random weights: shows that the parts fit and that learning goes down, not that it is good.
"""

from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from torch import Tensor

from livery import plugins
from livery.models.backbone import Backbone
from livery.models.load import load_backbone
from livery.nouns import AdapterCard, LossSpec, LowRankSpec, Recipe
from livery.tuners.adapter_file import attach_adapter, write_adapter
from livery.tuners.tuner import Attached, build

FAMILIES = ["sd1"]
TUNERS = {
    "lora": LowRankSpec(kind="lora", rank=4),
    "lora, alpha": LowRankSpec(kind="lora", rank=3, alpha=5),
    "lora, convolutions": LowRankSpec(kind="lora", rank=2, targets=r".*\.(conv1|conv2|to_[qkv])"),
}

pytestmark = [
    pytest.mark.parametrize("family", FAMILIES),
    pytest.mark.parametrize("spec", TUNERS.values(), ids=TUNERS.keys()),
]


def test_the_table_is_whole(family: str, spec: LowRankSpec):
    assert set(FAMILIES) == set(plugins.families())
    assert {each.kind for each in TUNERS.values()} == set(plugins.tuners())


def tiny(family: str) -> Backbone:
    return plugins.families()[family].tiny()


def weights(backbone: Backbone) -> dict[str, Tensor]:
    parts = backbone.modules().items()
    return {f"{part}.{name}": t.clone() for part, module in parts for name, t in module.state_dict().items()}


def answer(backbone: Backbone) -> Tensor:
    """The denoiser on fixed inputs."""
    side = backbone.resolution // backbone.latent.factor
    shape = (2, backbone.latent.channels, side, side)
    noisy = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    t = backbone.noise.levels(8)[[0, -1]]
    with torch.no_grad():
        return backbone.predict(noisy, t, backbone.encode_prompts(["a fox", ""]))


def learn(backbone: Backbone, attached: Attached, steps: int = 6) -> list[float]:
    """AdamW on one batch of random pictures with fixed noise; the loss before each step."""
    generator = torch.Generator().manual_seed(1)
    pixels = torch.rand(4, 3, backbone.resolution, backbone.resolution, generator=generator) * 2 - 1
    clean = backbone.encode_images(pixels)
    noise = torch.randn(clean.shape, generator=generator)
    t = backbone.noise.sample_timesteps(4, generator)
    noisy, target = backbone.noise.mix(clean, noise, t), backbone.noise.target(clean, noise, t)
    optimizer = torch.optim.AdamW(attached.params.values(), lr=1e-2)
    losses = []
    for _ in range(steps):
        guess = backbone.predict(noisy, t, backbone.encode_prompts(["a", "b", "c", ""]))
        rows = (guess - target).square().flatten(1).mean(1)
        loss = (backbone.noise.weight(t, LossSpec()) * rows).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def card(backbone: Backbone, spec: LowRankSpec) -> AdapterCard:
    return AdapterCard(
        recipe=Recipe(tuners=(spec,)),
        family=backbone.family,
        base_sha256=backbone.sha256,
        dataset="0" * 64,
        livery_version="0",
        step=6,
    )


def draw(pipe: DiffusionPipeline) -> np.ndarray:
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return cast(Any, pipe)("a fox", num_inference_steps=2, generator=generator, output_type="np").images


def test_attaching_changes_nothing(family: str, spec: LowRankSpec):
    backbone = tiny(family)
    before = answer(backbone)
    build(spec).attach(backbone)
    assert torch.equal(answer(backbone), before)


def test_learns_saves_reloads_and_detaches(family: str, spec: LowRankSpec, tmp_path: Path):
    backbone = tiny(family)
    base, before = answer(backbone), weights(backbone)
    attached = build(spec).attach(backbone)

    losses = learn(backbone, attached)
    assert losses[-1] < 0.97 * losses[0]
    tuned, state = answer(backbone), attached.state()
    assert not torch.allclose(tuned, base, atol=1e-3)
    write_adapter(tmp_path / "adapter.safetensors", card(backbone, spec), state)

    attached.undo()
    after = weights(backbone)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert torch.equal(answer(backbone), base)

    again = attach_adapter(backbone, tmp_path / "adapter.safetensors")
    assert torch.equal(answer(backbone), tuned)
    again.undo()
    fresh = tiny(family)
    attach_adapter(fresh, tmp_path / "adapter.safetensors")
    assert torch.equal(answer(fresh), tuned)


def test_diffusers_draws_the_same_pictures(family: str, spec: LowRankSpec, tmp_path: Path):
    backbone = tiny(family)
    backbone.save(tmp_path / "base")
    attached = build(spec).attach(backbone)
    learn(backbone, attached)
    write_adapter(tmp_path / "adapter.safetensors", card(backbone, spec), attached.state())
    stock = DiffusionPipeline.from_pretrained(tmp_path / "base", local_files_only=True)
    plain = draw(stock)
    cast(Any, stock).load_lora_weights(str(tmp_path / "adapter.safetensors"))
    ours = draw(backbone.pipeline())
    assert np.array_equal(draw(stock), ours)
    assert not np.array_equal(plain, ours)


def test_resumes_to_the_same_bits(family: str, spec: LowRankSpec):
    """State taken half-way continues as if nothing had happened; the optimiser is new in both runs."""
    backbone = tiny(family)
    attached = build(spec).attach(backbone, seed=1)
    learn(backbone, attached, 2)
    half = attached.state()
    learn(backbone, attached, 2)
    straight = attached.state()
    attached.undo()
    attached = build(spec).attach(backbone, seed=2)
    attached.load(half)
    learn(backbone, attached, 2)
    assert all(torch.equal(tensor, straight[name]) for name, tensor in attached.state().items())


def test_a_saved_base_takes_the_adapter(family: str, spec: LowRankSpec, tmp_path: Path):
    backbone = tiny(family)
    backbone.save(tmp_path / "base")
    attached = build(spec).attach(backbone)
    learn(backbone, attached, 2)
    write_adapter(tmp_path / "a.safetensors", card(backbone, spec), attached.state())
    loaded = load_backbone(tmp_path / "base")
    attach_adapter(loaded, tmp_path / "a.safetensors")
    assert torch.equal(answer(loaded), answer(backbone))
