"""The rate finder: on made-up curves, and on the tiny model, where no learning and ruin lie far apart."""

import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from livery.models.sd1 import SD1
from livery.nouns import Dataset, LiveryError, Photo, Progress, Rates, Recipe
from livery.train.rate_finder import chart, find_rate, suggestion

RATES = [10.0**power for power in range(-6, 1)]


def test_it_suggests_a_third_of_the_best_rate():
    assert suggestion(1.0, RATES, [1.0, 1.0, 0.9, 0.7, 0.5, 2.0, 3.0]) == pytest.approx(3e-4)


def test_one_lucky_look_is_smoothed_away():
    assert suggestion(1.0, RATES, [0.6, 1.0, 0.9, 0.7, 0.7, 0.75, 3.0]) == pytest.approx(3e-3)


@pytest.mark.parametrize("losses", [[1.0] * 7, [0.999] * 7, [1.0, 1.1, 1.3, 2.0, 3.0, 3.0, 3.0], []])
def test_where_nothing_was_learned_it_suggests_nothing(losses: list[float]):
    assert suggestion(1.0, RATES[: len(losses)], losses) is None


@pytest.fixture(scope="module")
def base() -> SD1:
    return SD1.tiny()


def test_a_sweep_finds_a_rate_that_learns_and_leaves_the_base_alone(
    base: SD1, recipe: Recipe, dataset: Dataset, pixels: Callable[[Photo], Image.Image], tmp_path: Path
):
    before = {name: tensor.clone() for name, tensor in base.denoiser.state_dict().items()}
    *events, last = find_rate(recipe, base, dataset, pixels=pixels, cache=tmp_path, steps=40, looks=20)
    assert isinstance(last, Rates)
    assert sum(isinstance(event, Progress) and event.stage == "try rates" for event in events) <= 40
    assert list(last.rates) == sorted(last.rates)
    assert last.suggested is not None
    assert 1e-4 <= last.suggested <= 1e-1
    assert last.losses[0] == pytest.approx(last.base, rel=0.02)  # next to nothing is learned at 1e-6
    assert min(last.losses) < 0.9 * last.base
    assert all(torch.equal(before[name], tensor) for name, tensor in base.denoiser.state_dict().items())


def test_what_has_no_rate_to_find_is_refused(base: SD1, dataset: Dataset, tmp_path: Path):
    for values, named in (
        ({"optimizer": {"kind": "prodigy"}, "learning_rate": 1.0}, "'prodigy' finds its rate"),
        ({"prior": {"kind": "photos", "prompt": "a dog"}}, r"leave \[prior\] out"),
    ):
        with pytest.raises(LiveryError, match=named):
            next(find_rate(Recipe.model_validate(values), base, dataset, pixels=_none, cache=tmp_path))


def _none(photo: Photo) -> Image.Image:
    raise AssertionError(f"{photo.sha256} was read")


def test_the_chart_marks_curve_and_suggestion():
    found = Rates(base=1.0, rates=tuple(RATES), losses=(1, 1, 0.9, 0.7, 0.5, 2, 3), suggested=1e-4)
    tree = ET.fromstring(chart(found))
    texts = [node.text for node in tree.iter("{http://www.w3.org/2000/svg}text")]
    assert {"suggested 0.0001", "base 1", "1e-6", "1e0", "learning rate"} <= set(texts)
    (line,) = tree.iter("{http://www.w3.org/2000/svg}polyline")
    points = [tuple(map(float, pair.split(","))) for pair in line.attrib["points"].split()]
    assert len(points) == 7
    assert [x for x, _ in points] == sorted(x for x, _ in points)
    assert max(points, key=lambda point: point[1]) == points[4]  # the lowest loss is the lowest point
    assert ET.fromstring(chart(Rates(base=1.0, rates=(), losses=(), suggested=None))) is not None
