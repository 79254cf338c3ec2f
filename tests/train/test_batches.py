"""Rows are functions of (seed, row): stable, fair, one size per batch, class rows in turn."""

from collections import Counter
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from livery.nouns import CaptionsSpec, LiveryError, Photo, PicturesSpec, PriorSpec, Recipe
from livery.train.batches import Plan, Row, batches_of_step, held_out_row
from livery.train.buckets import Framing
from livery.train.captions import form

SQUARES = Framing((64,), 16, buckets=False)
BUCKETS = Framing((64,), 16)


def photos(count: int, size: tuple[int, int] = (64, 64), start: int = 0, **given: object) -> list[Photo]:
    return [
        Photo.model_validate(
            {
                "sha256": f"{i:064x}",
                "width": size[0],
                "height": size[1],
                "captions": (f"a {i}", f"b {i}"),
                **given,
            }
        )
        for i in range(start, start + count)
    ]


FIVE = photos(5)
MIXED = [*photos(7), *photos(5, (64, 128), 7), *photos(1, (150, 64), 12)]
CLASS = photos(6, start=100, prior=True)


def batches(plan: Plan, steps: range) -> list[list[Row]]:
    return [rows for step in steps for rows in batches_of_step(plan, step)]


def told(rows: Sequence[Row]) -> list[tuple[object, ...]]:
    return [
        (row.photo.sha256, row.view, row.caption, row.weight, row.prior, row.random.initial_seed())
        for row in rows
    ]


def number(row: Row) -> int:
    return int(row.photo.sha256, 16)


# ------------------------------------------------------------------ one size


def test_a_row_is_the_same_each_time_and_other_with_another_seed():
    def rows(seed: int) -> list[tuple[object, ...]]:
        plan = Plan(FIVE, Recipe(seed=seed, batch_size=4), SQUARES)
        return [one for batch in batches(plan, range(5)) for one in told(batch)]

    assert rows(1) == rows(1)
    assert rows(1) != rows(2)


def test_each_epoch_holds_every_photo_once_in_its_own_order():
    plan = Plan(FIVE, Recipe(batch_size=5), SQUARES)
    epochs = [[number(row) for row in rows] for rows in batches(plan, range(8))]
    assert all(sorted(epoch) == list(range(5)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_rows_of_one_size_do_not_hang_on_how_a_step_is_cut():
    whole = Plan(FIVE, Recipe(batch_size=6, accumulate=1), SQUARES)
    cut = Plan(FIVE, Recipe(batch_size=2, accumulate=3), SQUARES)
    one = [row for rows in batches_of_step(whole, 3) for row in rows]
    two = [row for rows in batches_of_step(cut, 3) for row in rows]
    assert told(one) == told(two)
    for a, b in zip(one, two, strict=True):
        assert torch.equal(torch.randn(3, generator=a.random), torch.randn(3, generator=b.random))


# ------------------------------------------------------------------ buckets


def test_a_batch_is_full_and_of_one_size_and_all_sizes_come():
    plan = Plan(MIXED, Recipe(batch_size=4), BUCKETS)
    made = batches(plan, range(60))
    assert all(len(rows) == 4 for rows in made)
    sizes = {tuple({(row.view.width, row.view.height) for row in rows}) for rows in made}
    assert sizes == {((64, 64),), ((32, 64),), ((80, 32),)}


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=5),
    st.integers(1, 9),
    st.integers(0, 5),
    st.integers(1, 3),
)
def test_each_bucket_shows_all_its_photos_once_then_all_again(
    counts: list[int], batch_size: int, seed: int, accumulate: int
):
    """Whatever the sizes: every run of n rows of a bucket of n is its photos; no bucket runs ahead."""
    shapes = [(64, 64), (64, 96), (96, 64), (64, 160), (160, 64)]
    given_photos = [
        photo
        for index, count in enumerate(counts)
        for photo in photos(count, shapes[index], start=100 * index)
    ]
    plan = Plan(
        given_photos, Recipe(batch_size=batch_size, seed=seed, accumulate=accumulate), Framing((64,), 16)
    )
    assert len(plan.buckets) == len(counts)
    made = batches(plan, range(4 * len(given_photos)))
    streams: dict[int, list[int]] = {}
    for rows in made:
        streams.setdefault(number(rows[0]) // 100, []).extend(number(row) for row in rows)
    total = len(made) * batch_size
    for index, count in enumerate(counts):
        stream = streams.get(index, [])
        for first in range(0, len(stream) - count + 1, count):
            assert sorted(stream[first : first + count]) == list(range(100 * index, 100 * index + count))
        fair = total * count / len(given_photos)
        assert abs(len(stream) - fair) <= batch_size * (1 + len(counts)) + count


def test_a_step_is_the_same_whoever_comes_to_it_first():
    """A resumed run asks for a late step at once, or goes back."""
    recipe = Recipe(batch_size=4, accumulate=2, seed=3)
    onwards = Plan(MIXED, recipe, BUCKETS)
    expected = [told(rows) for rows in batches(onwards, range(40))]
    for start in (39, 17, 0, 25):
        fresh = Plan(MIXED, recipe, BUCKETS)
        found = [told(rows) for rows in batches_of_step(fresh, start)]
        assert found == expected[2 * start : 2 * start + 2]
        assert [told(rows) for rows in batches_of_step(onwards, start)] == found


def test_repeats_and_resolutions_multiply_and_weights_are_carried():
    twice = photos(1, repeats=3, weight=0.5)
    others = photos(2, start=1)
    plan = Plan([*twice, *others], Recipe(batch_size=5), Framing((32, 64), 16))
    made = batches(plan, range(2 * 30))
    seen = Counter((number(row), row.view.width) for rows in made for row in rows)
    assert {key: count / 30 for key, count in seen.items()} == pytest.approx(
        {(0, 32): 3, (0, 64): 3, (1, 32): 1, (1, 64): 1, (2, 32): 1, (2, 64): 1}, abs=0.2
    )
    assert {row.weight for rows in made for row in rows if number(row) == 0} == {0.5}
    assert {row.weight for rows in made for row in rows if number(row) > 0} == {1.0}


def test_pictures_are_mirrored_only_when_asked_for():
    def share(flip: float) -> float:
        recipe = Recipe(batch_size=8, pictures=PicturesSpec(flip=flip))
        plan = Plan(MIXED, recipe, BUCKETS)
        rows = [row for rows in batches(plan, range(100)) for row in rows]
        ways = {(one.photo.sha256, one.view) for one in plan.shown()}
        assert {(row.photo.sha256, row.view) for row in rows} == ways
        return sum(row.view.flipped for row in rows) / len(rows)

    assert share(0.0) == 0
    assert share(1.0) == 1
    assert 0.2 < share(0.25) < 0.3


# ------------------------------------------------------------------ captions


def test_captions_are_all_used_and_dropped_at_the_stated_share():
    plan = Plan(FIVE, Recipe(batch_size=10, captions=CaptionsSpec(dropout=0.25)), SQUARES)
    seen = Counter(row.caption for rows in batches(plan, range(200)) for row in rows)
    assert 0.21 < seen[""] / 2000 < 0.29
    assert seen.keys() == plan.captions()
    assert len(seen) == 11
    each = [seen[f"{x} {i}"] for x in "ab" for i in range(5)]
    assert max(each) < 2 * min(each)


@pytest.mark.parametrize(("dropout", "empty"), [(0.0, 0), (1.0, 50)])
def test_no_caption_is_dropped_at_zero_and_each_at_one(dropout: float, empty: int):
    plan = Plan(FIVE, Recipe(batch_size=5, captions=CaptionsSpec(dropout=dropout)), SQUARES)
    assert sum(not row.caption for rows in batches(plan, range(10)) for row in rows) == empty


def test_rows_choose_among_all_forms_and_what_is_chosen_was_told_beforehand():
    spec = CaptionsSpec(dropout=0.2, shuffle_tags=True, tag_dropout=0.2, variants=6)
    tagged = [photo.model_copy(update={"captions": ("x, a, b, c, d, e",)}) for photo in FIVE]
    recipe = Recipe(batch_size=10, captions=spec, trigger="acme")
    plan = Plan(tagged, recipe, SQUARES)
    seen = {row.caption for rows in batches(plan, range(60)) for row in rows}
    assert seen == {"", *(form("x, a, b, c, d, e", i, recipe) for i in range(6))} == plan.captions()


def test_a_held_out_row_is_plain():
    photo = MIXED[-1].model_copy(update={"weight": 3.0})
    recipe = Recipe(trigger="acme", pictures=PicturesSpec(flip=1.0))
    row = held_out_row(photo, recipe, Framing((64, 32), 16))
    assert (row.caption, row.weight, row.view.flipped) == ("a 12, acme", 1.0, False)
    assert row.view == Framing((64,), 16).view(150, 64, 64)
    assert row.random.initial_seed() == held_out_row(photo, Recipe(seed=9), BUCKETS).random.initial_seed()


# ------------------------------------------------------------------ the class


@pytest.mark.parametrize("batch_size", [1, 2, 5, 8])
def test_every_other_row_is_of_the_class(batch_size: int):
    prior = PriorSpec(kind="photos", prompt="a dog", weight=0.5)
    recipe = Recipe(batch_size=batch_size, prior=prior, trigger="acme", captions=CaptionsSpec(dropout=0.5))
    plan = Plan([*FIVE, *[photo.model_copy(update={"weight": 3.0}) for photo in CLASS]], recipe, SQUARES)
    rows = [row for rows in batches(plan, range(120 // batch_size)) for row in rows]
    assert [row.prior for row in rows] == [False, True] * (len(rows) // 2)
    of_class = [row for row in rows if row.prior]
    assert {(row.caption, row.weight, row.keeps_base) for row in of_class} == {("a dog", 1.5, False)}
    assert sorted(number(row) for row in of_class[:6]) == list(range(100, 106))
    assert sorted(number(row) for row in of_class[6:12]) == list(range(100, 106))
    subjects = [row for row in rows if not row.prior]
    assert sorted(number(row) for row in subjects[:5]) == list(range(5))
    assert "a dog" in plan.captions()


def test_class_photos_are_cut_to_the_subjects_buckets_and_each_is_used():
    recipe = Recipe(batch_size=4, prior=PriorSpec(kind="photos", prompt="a dog"))
    wide = photos(3, (128, 64), 200, prior=True)
    plan = Plan([*MIXED, *CLASS, *wide], recipe, BUCKETS)
    made = batches(plan, range(200))
    assert all(len({(row.view.width, row.view.height) for row in rows}) == 1 for rows in made)
    assert all([row.prior for row in rows] == [False, True] * 2 for rows in made)
    seen = Counter(number(row) for rows in made for row in rows if row.prior)
    assert seen.keys() == {*range(100, 106), *range(200, 203)}
    # The narrow bucket takes the first of the squares, the widest the last of the wide ones.
    sizes = {number(row): (row.view.width, row.view.height) for rows in made for row in rows if row.prior}
    assert [sizes[i] for i in (100, 101, 102, 105, 202)] == [(32, 64)] * 3 + [(64, 64), (80, 32)]
    shown = {(one.photo.sha256, one.view) for one in plan.shown()}
    assert {(row.photo.sha256, row.view) for rows in made for row in rows} == shown


def test_a_bucket_borrows_a_class_photo_where_there_are_few():
    recipe = Recipe(batch_size=2, prior=PriorSpec(kind="photos", prompt="a dog"))
    plan = Plan([*MIXED, CLASS[0]], recipe, BUCKETS)
    assert {number(row) for rows in batches(plan, range(40)) for row in rows if row.prior} == {100}


@pytest.mark.parametrize("batch_size", [1, 4])
def test_the_base_s_answer_is_asked_on_the_subjects_with_the_class_s_prompt(batch_size: int):
    prior = PriorSpec(kind="prediction", prompt="a dog", weight=0.25)
    plan = Plan([*MIXED, *CLASS], Recipe(batch_size=batch_size, prior=prior), BUCKETS)
    for bucket in plan.buckets:
        assert bucket.classes == bucket.subjects
    rows = [row for rows in batches(plan, range(200 // batch_size)) for row in rows]
    of_class = [row for row in rows if row.prior]
    assert len(of_class) == pytest.approx(len(rows) / 2, abs=len(plan.buckets))
    assert {(row.caption, row.weight, row.keeps_base) for row in of_class} == {("a dog", 0.25, True)}
    assert {number(row) for row in rows} == set(range(13))
    if batch_size > 1:
        pairs = zip(rows[::2], rows[1::2], strict=True)
        assert all(a.photo == b.photo and a.view == b.view and not a.keeps_base for a, b in pairs)


def test_class_photos_are_left_out_where_no_prior_is_asked_for():
    plan = Plan([*FIVE, *CLASS], Recipe(batch_size=5), SQUARES)
    assert {number(row) for rows in batches(plan, range(10)) for row in rows} == set(range(5))
    assert {int(one.photo.sha256, 16) for one in plan.shown()} == set(range(5))


def test_a_prior_of_photos_without_one_is_refused():
    with pytest.raises(LiveryError, match="no class photo"):
        Plan(FIVE, Recipe(prior=PriorSpec(kind="photos", prompt="a dog")), SQUARES)
