"""Class photos: found ones are kept, missing ones drawn once, the same whenever they are drawn."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from livery.nouns import LiveryError, Photo, PriorSpec
from livery.train.prior import AT_ONCE, ClassPhotos

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
    events = ClassPhotos(folder, base).complete([SUBJECT, FOUND], prior, draw)
    try:
        while True:
            next(events)
    except StopIteration as end:
        return list(end.value)


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
