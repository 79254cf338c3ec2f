"""Every preset trains: its tuners fit its family, its optimiser and memory settings work together.

Two steps on the tiny model of the preset's family: shows that the parts fit, not that the figures are good.
"""

import colorsys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image

from livery import plugins, presets
from livery.models.backbone import Backbone
from livery.nouns import Dataset, Photo, Recipe, Step, Trained, read_recipe
from livery.train.loop import train

SHA = "0" * 64


def paint(photo: Photo) -> Image.Image:
    red, green, blue = colorsys.hsv_to_rgb(int(photo.sha256[:8], 16) / 7, 1, 1)
    return Image.new("RGB", (photo.width, photo.height), (int(red * 255), int(green * 255), int(blue * 255)))


def draw(prompts: Sequence[str], seeds: Sequence[int]) -> Iterator[Image.Image]:
    return (Image.new("RGB", (32, 32), (seed % 256, 99, 0)) for seed in seeds)


def short(recipe: Recipe, base: Backbone) -> Recipe:
    """The preset for two steps on little pictures; what is trained, and how, stays."""
    return recipe.model_copy(
        update={
            "steps": 2,
            "steps_per_photo": None,
            "batch_size": 1,
            "validate_every": 0,
            "base": "tiny",
            "pictures": recipe.pictures.model_copy(update={"resolutions": (base.resolution,)}),
            "prior": recipe.prior.model_copy(update={"count": 1}),
            "stop": recipe.stop.model_copy(update={"check_effect_at": 0}),
            "optimizer": recipe.optimizer.model_copy(update={"warmup_steps": 0}),
        }
    )


@pytest.mark.parametrize("name", presets.names())
def test_a_preset_trains_on_the_tiny_model_of_its_family(name: str, tmp_path: Path) -> None:
    recipe = presets.read(name)
    base = plugins.families()[recipe.family or ""].tiny()
    photos = tuple(
        Photo(sha256=f"{i:08x}{SHA[8:]}", width=40, height=32 + 8 * i, captions=(f"colour {i}",))
        for i in range(2)
    )
    before = {name: tensor.clone() for name, tensor in base.denoiser.state_dict().items()}
    dataset = Dataset(name="colours", photos=photos)
    chosen = short(recipe, base)
    events = list(train(chosen, base, dataset, pixels=paint, folder=tmp_path, draw=draw))
    assert [event.step for event in events if isinstance(event, Step)] == [1, 2]
    assert all(torch.isfinite(torch.tensor(event.loss)) for event in events if isinstance(event, Step))
    assert isinstance(events[-1], Trained)
    assert events[-1].adapter.card.recipe.tuners == recipe.tuners
    assert read_recipe(tmp_path / "recipe.toml") == chosen, "the effective recipe lies beside the result"
    after = base.denoiser.state_dict()
    if recipe.memory.weights == "fp32":
        assert all(torch.equal(after[name], before[name]) for name in before)
