"""Buckets: every picture near its own shape, little cut, never at the top, and nothing too large."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from livery.models.sd1 import SD1
from livery.nouns import LiveryError, Photo, Recipe
from livery.train.buckets import Framing, Shown, View, cover, shown_mask, shown_pixels

SD = Framing((512,), 64)
SIDES = st.integers(1, 6000)


@pytest.mark.parametrize(
    ("size", "bucket"),
    [
        ((512, 512), (512, 512)),
        ((1000, 1001), (512, 512)),
        ((4000, 3000), (576, 448)),
        ((3000, 4000), (448, 576)),
        ((1920, 1080), (640, 384)),
        ((100, 400), (256, 1024)),
        ((400, 100), (1024, 256)),
        ((300, 100), (768, 256)),
        ((100, 1000), (256, 1024)),
        ((3, 2), (576, 384)),
        ((2560, 1080), (768, 320)),
    ],
)
def test_the_bucket_of_a_shape(size: tuple[int, int], bucket: tuple[int, int]):
    assert SD.bucket(*size, 512) == bucket


@settings(deadline=None)
@given(SIDES, SIDES, st.sampled_from([(512, 64), (512, 8), (768, 64), (1024, 64), (1024, 32), (96, 32)]))
def test_a_bucket_is_in_steps_within_the_area_and_cuts_at_most_one_step(
    width: int, height: int, facts: tuple[int, int]
):
    side, step = facts
    framing = Framing((side,), step)
    view = framing.view(width, height, side)
    assert view.width % step == view.height % step == 0
    assert 0 < view.width * view.height <= side * side
    assert max(view.width, view.height) <= 4 * min(view.width, view.height)
    assert (view.width >= view.height) == (width >= height) or view.width == view.height
    right, bottom = view.resized[0] - view.width, view.resized[1] - view.height
    assert min(right, bottom) <= 1  # only one side is cut, save for rounding
    assert view.top == 0
    assert view.left == right // 2
    if max(width, height) <= 4 * min(width, height) and side >= 8 * step:
        assert max(right, bottom) <= step


@settings(deadline=None)
@given(SIDES, SIDES)
def test_resizing_keeps_the_shape(width: int, height: int):
    view = SD.view(width, height, 512)
    scale = max(view.width / width, view.height / height)
    assert view.resized[0] == pytest.approx(width * scale, abs=0.51)
    assert view.resized[1] == pytest.approx(height * scale, abs=0.51)


@settings(deadline=None)
@given(st.integers(64, 3000), st.integers(64, 3000))
def test_without_upscaling_no_picture_grows(width: int, height: int):
    framing = Framing((1024,), 64, upscale=False)
    view = framing.view(width, height, 1024)
    assert view.width <= width
    assert view.height <= height
    assert view.width * view.height <= 1024 * 1024


def test_upscaling_is_the_default_and_small_pictures_may_stay_small():
    assert Framing((1024,), 64).bucket(200, 300, 1024) == (832, 1216)
    assert Framing((1024,), 64, upscale=False).bucket(200, 300, 1024) == (192, 256)
    assert Framing((1024,), 64, upscale=False).bucket(30, 30, 1024) == (64, 64)  # one step at least


def test_each_side_is_one_view_in_order():
    views = Framing((256, 512), 64).views(100, 400)
    assert [(view.width, view.height) for view in views] == [(128, 512), (256, 1024)]


def test_squares_are_as_they_were():
    framing = Framing((32,), 2, buckets=False)
    image = Image.effect_noise((50, 77), 80).convert("RGB")
    [view] = framing.views(*image.size)
    resized = image.resize((32, 49), Image.Resampling.LANCZOS).crop((0, 8, 32, 40))
    expected = torch.from_numpy(np.array(resized, np.float32)).permute(2, 0, 1) / 127.5 - 1
    assert torch.equal(shown_pixels(image, view), expected)
    assert torch.equal(shown_pixels(image, cover(*image.size, (32, 32), keep_top=False)), expected)


# ------------------------------------------------------------------ heads


@pytest.mark.parametrize("shape", [(100, 400), (100, 399), (100, 350), (100, 300), (90, 160), (100, 105)])
def test_a_head_at_the_top_of_a_tall_picture_is_never_cut(shape: tuple[int, int]):
    """The top twentieth is red: all of it, from edge to edge, is there, and no higher part is missing."""
    width, height = 6 * shape[0], 6 * shape[1]
    image = Image.new("RGB", (width, height), "white")
    image.paste("red", (0, 0, width, height // 20))
    for step, side in ((64, 512), (32, 96)):
        view = Framing((side,), step).view(width, height, side)
        pixels = shown_pixels(image, view)
        rows = (pixels[1] < 0).all(dim=1).nonzero().flatten().tolist()
        assert rows[0] == 0
        assert len(rows) == pytest.approx(view.resized[1] / 20, abs=1.01)


@pytest.mark.parametrize("shape", [(400, 100), (300, 100), (1000, 430), (160, 90)])
def test_both_ends_of_a_wide_picture_lose_the_same(shape: tuple[int, int]):
    width, height = 6 * shape[0], 6 * shape[1]
    image = Image.new("RGB", (width, height), "white")
    image.paste("red", (0, 0, width // 10, height))
    image.paste("blue", (width - width // 10, 0, width, height))
    view = SD.view(width, height, 512)
    middle = shown_pixels(image, view)[:, view.height // 2]
    red, blue = int((middle[2] < 0).sum()), int((middle[0] < 0).sum())
    assert abs(red - blue) <= 1
    assert red >= view.resized[0] / 10 - 32 - 1


def test_beyond_the_longest_shape_the_feet_are_cut_not_the_head():
    image = Image.new("RGB", (100, 1000), "white")
    image.paste("red", (0, 0, 100, 50))
    image.paste("blue", (0, 950, 100, 1000))
    view = SD.view(100, 1000, 512)
    pixels = shown_pixels(image, view)
    assert pixels[1, 0].max() < 0
    assert pixels[1, -1].min() > 0  # white: below it, 60 per cent are not shown
    assert view.cut == pytest.approx(0.6)
    assert Framing((512,), 64, max_ratio=10).view(100, 1000, 512).cut < 0.05


# ------------------------------------------------------------------ mirrored, sizes, masks


def test_mirrored_pixels_are_the_same_pixels_the_other_way_round():
    image = Image.effect_noise((177, 101), 80).convert("RGB")
    view = Framing((64,), 16).view(*image.size, 64)
    assert view.left
    assert torch.equal(shown_pixels(image, view.mirrored()), shown_pixels(image, view).flip(-1))
    assert view.mirrored().mirrored() == view


def test_the_left_of_a_mirrored_view_counts_in_the_mirrored_picture():
    """What a script that mirrors first and cuts then would see."""
    image = Image.effect_noise((155, 100), 80).convert("RGB")
    view = View(100, 100, (155, 100), 27, 0)
    other = view.mirrored()
    assert other.left == 28
    cut = ImageOps.mirror(image).crop((28, 0, 128, 100))
    expected = torch.from_numpy(np.array(cut, np.float32)).permute(2, 0, 1) / 127.5 - 1
    assert torch.equal(shown_pixels(image, other), expected)


def test_micro_conditioning_is_original_crop_and_target():
    photo = Photo(sha256="1" * 64, width=1000, height=100)
    shown = Shown(photo, SD.view(1000, 100, 512))
    assert shown.view.resized == (2560, 256)
    assert shown.size == (100, 1000, 0, 768, 256, 1024)


def test_a_mask_is_cut_as_its_picture_and_counts_shares_of_cells():
    mask = Image.new("L", (64, 128), 0)
    mask.paste(255, (0, 0, 20, 128))
    view = View(64, 64, (64, 128), 0, 0)
    cells = shown_mask(mask, view, 8)
    assert cells.shape == (1, 8, 8)
    assert cells[0, 3].tolist() == [1, 1, 0.5, 0, 0, 0, 0, 0]
    assert shown_mask(mask, view.mirrored(), 8)[0, 3].tolist() == [0, 0, 0, 0, 0, 0.5, 1, 1]


def test_a_mask_lies_on_what_it_marks():
    """A red thing in a picture of any shape: where the mask counts, the picture is red."""
    image, mask = Image.new("RGB", (400, 130), "white"), Image.new("L", (400, 130), 0)
    image.paste("red", (240, 20, 330, 110))
    mask.paste(255, (240, 20, 330, 110))
    view = Framing((192,), 32).view(400, 130, 192)
    cells, pixels = shown_mask(mask, view, 8)[0], shown_pixels(image, view)
    green = torch.nn.functional.avg_pool2d(pixels[1][None, None], 8)[0, 0]
    assert (cells > 0.99).sum() > 8
    assert (green[cells > 0.99] < -0.9).all()
    assert (green[cells < 0.01] > 0.9).all()


@settings(deadline=None)
@given(st.integers(1, 400), st.integers(1, 400))
def test_any_shape_comes_out_as_its_bucket_within_range(width: int, height: int):
    view = Framing((64,), 16).view(width, height, 64)
    pixels = shown_pixels(Image.new("L", (width, height), 200), view)
    assert pixels.shape == (3, view.height, view.width)
    assert torch.allclose(pixels, torch.tensor(200 / 127.5 - 1), atol=1e-6)


# ------------------------------------------------------------------ what a recipe asks of a base


def test_framing_takes_the_base_s_facts_where_the_recipe_is_silent():
    base = SD1.tiny()
    assert Framing.of(Recipe(), base) == Framing((32,), base.bucket_step)
    asked = {"resolutions": (32, 48), "bucket_step": 8, "max_ratio": 2.0, "upscale": False}
    recipe = Recipe.model_validate({"pictures": asked})
    assert Framing.of(recipe, base) == Framing((32, 48), 8, True, 2.0, False)
    assert Framing.of(Recipe.model_validate({"pictures": {"buckets": False}}), base).buckets is False


@pytest.mark.parametrize(
    ("pictures", "message"),
    [
        ({"bucket_step": 7}, r"pictures\.bucket_step 7 is not a multiple of 2, as this base needs: try 8"),
        ({"buckets": False, "resolutions": [33]}, "resolution 33 is not a multiple of 2"),
        ({"resolutions": [2]}, "resolution 2 is below 4"),
    ],
)
def test_what_does_not_fit_the_base_is_said(pictures: dict[str, object], message: str):
    with pytest.raises(LiveryError, match=message):
        Framing.of(Recipe.model_validate({"pictures": pictures}), SD1.tiny())


def test_cover_fills_the_bucket_whatever_the_shape():
    assert cover(10, 1000, (64, 64)) == View(64, 64, (64, 6400), 0, 0)
    assert cover(1000, 10, (64, 64)) == View(64, 64, (6400, 64), 3168, 0)
