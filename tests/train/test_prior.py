"""Class photos: found ones are kept, missing ones drawn once, the same whenever they are drawn."""

from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from livery.models.sd1 import SD1
from livery.nouns import (
    Dataset,
    FullSpec,
    LiveryError,
    LowRankSpec,
    Photo,
    PriorSpec,
    Progress,
    Recipe,
    Step,
)
from livery.train.batches import Plan, batches_of_step
from livery.train.buckets import Framing, shown_pixels
from livery.train.loop import train
from livery.train.prior import AT_ONCE, ClassPhotos

Paint = Callable[[Photo], Image.Image]
PRIOR = PriorSpec(kind="photos", prompt="a dog", count=10)
SUBJECT = Photo(sha256="1" * 64, width=8, height=8)
FOUND = Photo(sha256="2" * 64, width=8, height=8, prior=True)
BASE = "b" * 64


class Drawer:
    """Noise of each seed; remembers what was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[list[str], list[int]]] = []

    def __call__(self, prompts: Sequence[str], seeds: Sequence[int]) -> Iterator[Image.Image]:
        self.asked.append((list(prompts), list(seeds)))
        for seed in seeds:
            yield Image.fromarray(np.random.default_rng(seed).integers(0, 256, (16, 24, 3), np.uint8))


def complete(folder: Path, draw: Drawer | None, prior: PriorSpec = PRIOR, base: str = BASE) -> list[Photo]:
    return list(_all(ClassPhotos(folder, base).complete([SUBJECT, FOUND], prior, draw)))


def test_what_lacks_is_drawn_in_fixed_groups(tmp_path: Path):
    draw = Drawer()
    photos = complete(tmp_path, draw)
    assert photos[:2] == [SUBJECT, FOUND]
    assert len(photos) == 1 + PRIOR.count
    assert all(photo.prior and photo.captions == ("a dog",) for photo in photos[2:])
    assert (photos[2].width, photos[2].height) == (24, 16)
    assert len({photo.sha256 for photo in photos}) == len(photos)
    assert [len(seeds) for _, seeds in draw.asked] == [AT_ONCE, AT_ONCE]
    assert {prompt for prompts, _ in draw.asked for prompt in prompts} == {"a dog"}
    assert len({seed for _, seeds in draw.asked for seed in seeds}) == 2 * AT_ONCE


def test_drawn_pictures_are_drawn_once_for_all_runs(tmp_path: Path):
    first = complete(tmp_path, Drawer())
    assert complete(tmp_path, None) == first
    assert complete(tmp_path, None, PRIOR.model_copy(update={"count": 5})) == first[:6]


def test_a_picture_that_was_lost_comes_back_the_same(tmp_path: Path):
    first = complete(tmp_path, Drawer())
    for path in sorted(tmp_path.rglob("*.png"))[::3]:
        path.unlink()
    assert complete(tmp_path, Drawer()) == first


@pytest.mark.parametrize("change", [{"prompt": "a cat"}, {"seed": 1}])
def test_another_prompt_or_seed_is_another_picture(tmp_path: Path, change: dict[str, object]):
    draw = Drawer()
    one, two = complete(tmp_path, draw), complete(tmp_path, draw, PRIOR.model_copy(update=change))
    assert len(draw.asked) == 4
    assert len(list(tmp_path.rglob("*.png"))) == 4 * AT_ONCE
    if "seed" in change:
        assert {photo.sha256 for photo in one[2:]}.isdisjoint(photo.sha256 for photo in two[2:])


def test_another_base_draws_its_own(tmp_path: Path):
    draw = Drawer()
    complete(tmp_path, draw)
    complete(tmp_path, draw, base="c" * 64)
    assert len(draw.asked) == 4


def test_nothing_is_drawn_where_enough_are_found_or_none_are_wanted(tmp_path: Path):
    enough = PRIOR.model_copy(update={"count": 1})
    assert complete(tmp_path, None, enough) == [SUBJECT, FOUND]
    for kind in ("none", "prediction"):
        assert complete(tmp_path, None, PRIOR.model_copy(update={"kind": kind})) == [SUBJECT, FOUND]


def test_without_anything_to_draw_with_the_error_says_what_to_do(tmp_path: Path):
    with pytest.raises(LiveryError, match=r"prior\.count is 10 and the dataset has 1 class photos"):
        complete(tmp_path, None)


def test_they_are_read_from_the_folder_and_all_others_as_before(tmp_path: Path):
    drawn = ClassPhotos(tmp_path, BASE)
    [*_, photo] = _returned(drawn)
    read = drawn.reading(lambda photo: Image.new("RGB", (photo.width, photo.height), "red"))
    assert read(photo).size == (24, 16)
    assert read(photo).tobytes() != Image.new("RGB", (24, 16), "red").tobytes()
    assert read(SUBJECT).getpixel((0, 0)) == (255, 0, 0)


def _returned(drawn: ClassPhotos) -> list[Photo]:
    events, total = drawn.complete([SUBJECT], PRIOR, Drawer()), 0
    while True:
        try:
            progress = next(events)
        except StopIteration as end:
            assert total == PRIOR.count
            return list(end.value)
        total += 1
        assert (progress.done, progress.total) == (total, PRIOR.count)


# ------------------------------------------------------------------ in a whole run


@pytest.mark.parametrize("spec", [LowRankSpec(rank=2), FullSpec()], ids=lambda spec: spec.kind)
def test_class_rows_count_with_their_weight_whatever_learns(
    spec: LowRankSpec | FullSpec, recipe: Recipe, dataset: Dataset, pixels: Paint, tmp_path: Path
):
    """The loss of the first step, where nothing has changed yet, against the formula written out."""
    base, prior = SD1.tiny(), PRIOR.model_copy(update={"weight": 0.5, "count": 3})
    asked = recipe.model_copy(
        update={"tuners": (spec,), "prior": prior, "batch_size": 4, "steps": 1, "validate_every": 0}
    )
    draw = Drawer()
    events = train(asked, base, dataset, pixels=pixels, folder=tmp_path, draw=draw)
    [step] = [event for event in events if isinstance(event, Step)]

    drawn = ClassPhotos(tmp_path / "cache" / "class", base.sha256)
    photos = _all(drawn.complete(dataset.split("train"), prior, None))
    read, plan = drawn.reading(pixels), Plan(photos, asked, Framing.of(asked, base))
    total = 0.0
    for row in next(batches_of_step(plan, 0)):
        assert row.prior == (row.caption == "a dog" and row.photo.captions == ("a dog",))
        clean = base.encode_images(shown_pixels(read(row.photo), row.view)[None])
        t = torch.randint(1000, (1,), generator=row.random)
        noise = torch.randn(clean[0].shape, generator=row.random)[None]
        signal = float(base.noise.alpha_bar[t])  # pyright: ignore[reportAttributeAccessIssue]
        noisy = signal**0.5 * clean + (1 - signal) ** 0.5 * noise
        with torch.no_grad():
            answer = base.predict(noisy, t, base.encode_prompts([row.caption]))
        snr = signal / (1 - signal)
        weight = (0.5 if row.prior else 1.0) * row.photo.weight * min(snr, 5) / snr
        total += weight * float((answer - noise).square().mean())
    assert step.loss == pytest.approx(total / 4, rel=1e-4)
    assert draw.asked


@pytest.mark.parametrize("spec", [LowRankSpec(rank=2), FullSpec()], ids=lambda spec: spec.kind)
def test_the_base_s_own_answer_is_right_at_the_start_and_holds_later(
    spec: LowRankSpec | FullSpec, recipe: Recipe, dataset: Dataset, pixels: Paint, tmp_path: Path
):
    """Class rows add nothing to the first loss: the base is still what it was. Later they do."""

    def losses(weight: float) -> list[float]:
        prior = PriorSpec(kind="prediction", prompt="a dog", weight=weight)
        change = {"tuners": (spec,), "prior": prior, "batch_size": 4, "steps": 3, "validate_every": 0}
        asked = recipe.model_copy(update=change)
        folder = tmp_path / f"{weight}"
        events = train(asked, SD1.tiny(), dataset, pixels=pixels, folder=folder)
        return [event.loss for event in events if isinstance(event, Step)]

    light, heavy = losses(1e-6), losses(1000.0)
    assert light[0] == pytest.approx(heavy[0], rel=1e-4)
    assert heavy[2] > light[2] * 1.01


def _all(events: Generator[Progress, None, tuple[Photo, ...]]) -> tuple[Photo, ...]:
    while True:
        try:
            next(events)
        except StopIteration as end:
            return end.value


def test_class_photos_alone_are_nothing_to_learn_from(recipe: Recipe, pixels: Paint, tmp_path: Path):
    dataset = Dataset(name="dogs", photos=(FOUND,))
    with pytest.raises(LiveryError, match="no photo in its split 'train'"):
        list(train(recipe, SD1.tiny(), dataset, pixels=pixels, folder=tmp_path))
