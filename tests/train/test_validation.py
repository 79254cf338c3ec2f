"""The fixed grid against the same sums in a loop, and what a curve says."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from livery.models.noise import for_recipe
from livery.models.sd1 import SD1
from livery.nouns import Dataset, LossSpec, Photo, Recipe, StopSpec, Validation
from livery.train.batches import random_of
from livery.train.buckets import Framing
from livery.train.cache import Encodings, TensorCache
from livery.train.validation import Grid, best, change, grid_loss, waited, watched

Paint = Callable[[Photo], Image.Image]


@pytest.fixture(scope="module")
def base() -> SD1:
    return SD1.tiny()


def test_the_loss_is_the_mean_of_all_photos_at_all_levels_however_they_are_batched(
    base: SD1, dataset: Dataset, pixels: Paint, tmp_path: Path
):
    """Photos of two shapes; each cell worked out alone, with noise that hangs on photo and level only."""
    tall = [
        photo.model_copy(update={"height": 60 if i % 2 else 32}) for i, photo in enumerate(dataset.photos)
    ]
    recipe = Recipe(precision="fp32", loss=LossSpec(kind="huber", huber_delta=0.5))
    encodings = Encodings(base, TensorCache(tmp_path), pixels, recipe.pictures, towers_train=False)
    law = for_recipe(base.noise, recipe)
    errors: list[float] = []
    for row in Grid.of(tall, recipe, Framing.of(recipe, base)).rows:
        for level in law.levels(8):
            clean, t = encodings.latents([row]), level[None]
            name = str(level.item())
            noise = torch.randn(clean.shape[1:], generator=random_of("held-out", row.photo.sha256, name))[
                None
            ]
            with torch.no_grad():
                guess = base.predict(law.mix(clean, noise, t), t, base.encode_prompts([row.caption]))
            huber = 2 * torch.nn.functional.huber_loss(guess, noise, delta=0.5)
            errors.append(float(huber * law.weight(t, recipe.loss)))
    wanted = sum(errors) / len(errors)
    for size in (1, 5):
        cut = recipe.model_copy(update={"batch_size": size})
        found = grid_loss(base, law, Grid.of(tall, cut, Framing.of(cut, base)), encodings)
        assert found == pytest.approx(wanted, rel=1e-5)


def test_as_many_training_photos_are_watched_as_are_held_out_and_none_of_the_class(dataset: Dataset):
    of_class = dataset.photos[0].model_copy(update={"sha256": "0" * 63 + "f", "prior": True})
    held_out, trained = watched(dataset.model_copy(update={"photos": (of_class, *dataset.photos)}))
    assert held_out == list(dataset.split("validation"))
    assert trained == sorted(dataset.split("train"), key=lambda photo: photo.sha256)[:2]


def curve(*losses: float, scores: tuple[float, ...] = ()) -> list[Validation]:
    return [
        Validation(step=i * 10, loss=loss, train=loss / 2, score=scores[i] if scores and i else None)
        for i, loss in enumerate(losses)
    ]


@pytest.mark.parametrize(
    ("losses", "min_gain", "step", "since"),
    [
        ((1.0, 0.9, 0.8, 0.85, 0.7), 0.0, 40, 0),
        ((1.0, 0.9, 0.8, 0.85, 0.81), 0.0, 20, 2),
        ((1.0, 0.9, 0.89, 0.88, 0.5), 0.1, 40, 0),
        ((1.0, 0.9, 0.89, 0.88, 0.87), 0.1, 10, 3),
        ((0.1, 0.9, 0.95), 0.0, 10, 1),
    ],
    ids=["last", "middle", "large gain", "small gains", "never below the base"],
)
def test_the_best_look_and_how_long_ago_it_was(
    losses: tuple[float, ...], min_gain: float, step: int, since: int
):
    stop = StopSpec(min_gain=min_gain)
    found = best(curve(*losses), stop)
    assert found
    assert found.step == step
    assert waited(curve(*losses), stop) == since


def test_scores_count_before_losses():
    looks = curve(1.0, 0.5, 0.9, 0.7, scores=(0, 0.1, 0.4, 0.3))
    found = best(looks, StopSpec())
    assert found
    assert found.step == 20


def test_without_a_look_at_something_trained_there_is_no_best():
    assert best(curve(1.0), StopSpec()) is None
    assert waited(curve(1.0), StopSpec()) == 0


def test_the_change_is_a_share_of_the_bases_loss():
    looks = [Validation(step=0, loss=2.0, train=1.0), Validation(step=5, loss=1.6, train=0.4)]
    assert change(looks, looks[1]) == pytest.approx((0.8, 0.4))
    assert change(looks[1:], looks[1]) is None
