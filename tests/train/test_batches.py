"""Rows are functions of (seed, row): stable, fair, and the same however they are batched."""

from collections import Counter

import torch

from livery.nouns import Photo, Recipe
from livery.train.batches import batches_of_step, captions_of, random_of, row

PHOTOS = [Photo(sha256=f"{i:064x}", width=8, height=8, captions=(f"a {i}", f"b {i}")) for i in range(5)]


def told(recipe: Recipe, index: int) -> tuple[str, str, list[float]]:
    made = row(PHOTOS, recipe, index)
    return made.photo.sha256, made.caption, torch.randn(3, generator=made.random).tolist()


def test_a_row_is_the_same_each_time_and_other_with_another_seed():
    recipe = Recipe(seed=1)
    assert [told(recipe, i) for i in range(20)] == [told(recipe, i) for i in range(20)]
    assert [told(recipe, i) for i in range(20)] != [told(Recipe(seed=2), i) for i in range(20)]


def test_each_epoch_holds_every_photo_once_in_its_own_order():
    recipe = Recipe()
    epochs = [[row(PHOTOS, recipe, 5 * e + i).photo.sha256 for i in range(5)] for e in range(8)]
    assert all(sorted(epoch) == sorted(photo.sha256 for photo in PHOTOS) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_rows_do_not_hang_on_how_a_step_is_cut():
    whole, cut = Recipe(batch_size=6, accumulate=1), Recipe(batch_size=2, accumulate=3)
    one = [made for batch in batches_of_step(PHOTOS, whole, 3) for made in batch]
    two = [made for batch in batches_of_step(PHOTOS, cut, 3) for made in batch]
    assert [(a.photo, a.caption) for a in one] == [(b.photo, b.caption) for b in two]
    assert all(a.random.initial_seed() == b.random.initial_seed() for a, b in zip(one, two, strict=True))


def test_captions_are_all_used_and_dropped_at_the_stated_share():
    recipe = Recipe(caption_dropout=0.25)
    seen = Counter(row(PHOTOS, recipe, i).caption for i in range(2000))
    assert 0.21 < seen[""] / 2000 < 0.29
    assert len(seen) == 11
    assert max(seen[f"{x} {i}"] for x in "ab" for i in range(5)) < 2 * min(
        seen[f"{x} {i}"] for x in "ab" for i in range(5)
    )


def test_no_caption_is_dropped_at_zero_and_each_at_one():
    assert all(row(PHOTOS, Recipe(caption_dropout=0), i).caption for i in range(50))
    assert not any(row(PHOTOS, Recipe(caption_dropout=1), i).caption for i in range(50))


def test_the_trigger_stands_behind_each_caption_and_alone_where_there_is_none():
    assert captions_of(PHOTOS[0], "x") == ("a 0, x", "b 0, x")
    assert captions_of(Photo(sha256="0" * 64, width=1, height=1), "x") == ("x",)


def test_streams_of_neighbouring_names_are_unrelated():
    draws = {
        tuple(torch.randn(2, generator=random_of(*n)).tolist())
        for n in [(0, "a", 1), (0, "a", 2), (1, "a", 1)]
    }
    assert len(draws) == 3
