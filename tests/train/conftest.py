"""A dataset and recipes for a model that trains in seconds on a CPU."""

import colorsys
from collections.abc import Callable

import pytest
from PIL import Image

from livery.nouns import Dataset, LowRankSpec, OptimizerSpec, Photo, PicturesSpec, Recipe, StopSpec


@pytest.fixture
def dataset() -> Dataset:
    """Five photos to learn from and two held out; `pixels` gives them their colours."""
    return Dataset(
        name="colours",
        photos=tuple(
            Photo(
                sha256=f"{i:064x}",
                width=40,
                height=32,
                captions=(f"colour {i}",),
                split="train" if i < 5 else "validation",
                licence="CC0-1.0",
                weight=1 + i / 4,
            )
            for i in range(7)
        ),
    )


@pytest.fixture
def pixels() -> Callable[[Photo], Image.Image]:
    def paint(photo: Photo) -> Image.Image:
        red, green, blue = colorsys.hsv_to_rgb(int(photo.sha256, 16) / 7, 1, 1)
        image = Image.new("RGB", (photo.width, photo.height), "white")
        image.paste((int(red * 255), int(green * 255), int(blue * 255)), (8, 8, 32, 24))
        return image

    return paint


@pytest.fixture
def recipe() -> Recipe:
    return Recipe(
        tuners=(LowRankSpec(rank=2),),
        trigger="acme style",
        steps=4,
        batch_size=2,
        learning_rate=1e-2,
        precision="fp32",
        validate_every=2,
        checkpoint_every=2,
        pictures=PicturesSpec(buckets=False),
        optimizer=OptimizerSpec(warmup_steps=1),
        stop=StopSpec(keep="last"),
    )
