"""Pictures of one colour each, encoded once: what the benchmarks of a step train on."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from livery.models.backbone import Backbone
from livery.nouns import Photo, Recipe
from livery.train.batches import Plan
from livery.train.buckets import Framing
from livery.train.cache import Encodings, TensorCache


def encoded(base: Backbone, recipe: Recipe, side: int, count: int, folder: Path) -> tuple[Plan, Encodings]:
    """The rows of `count` pictures of side x side pixels, with their encodings in `folder`."""
    photos = [
        Photo(sha256=f"{i:064x}", width=side, height=side, captions=(f"picture {i}",)) for i in range(count)
    ]

    def paint(photo: Photo) -> Image.Image:
        return Image.new("RGB", (side, side), (int(photo.sha256, 16) * 240 // count, 99, 200))

    encodings = Encodings(base, TensorCache(folder), paint, recipe.pictures, towers_train=False)
    plan = Plan(photos, recipe, Framing.of(recipe, base))
    for _ in encodings.fill(plan.shown(), plan.captions()):
        pass
    return plan, encodings
