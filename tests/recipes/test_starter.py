"""The starter's recipe: its loop resumes exactly, its scenes show what its captions say."""

import random
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from recipes.starter import brand, fit, vae
from recipes.starter.emoji import Concept, square_svg
from recipes.starter.recipe import StarterRecipe
from recipes.starter.scenes import BACKGROUNDS, Captions, Scene, article, paint, pair, plural, several, single

CONCEPTS = [
    Concept("red apple", ["apple", "fruit"], 4, "1f34e"),
    Concept("cat", ["animal", "pet", "kitty"], 3, "1f408"),
    Concept("dog", ["animal", "pet"], 3, "1f415"),
]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.used, self.unused = nn.Linear(3, 2), nn.Parameter(torch.ones(1))


def live(folder: Path, stop: int) -> fit.Fit:
    """Train from the last checkpoint, or from the start, until step `stop`."""
    net = Net()
    job = fit.Fit("net", net, folder, steps=6, peak=0.1, warmup=2, ema=0.9)

    def loss_of(step: int) -> Tensor:
        x = torch.randn(4, 3, generator=fit.generator(1, step))
        return net.used(x).square().mean()

    for done, _ in job.run(loss_of, every=-1):
        if done == stop:
            break
    assert job.step == stop
    return job


def weights(job: fit.Fit) -> dict[str, Tensor]:
    return {**job.module.state_dict(), **{f"average.{k}": v for k, v in job.average.items()}}


@pytest.mark.parametrize("stop", [1, 3, 5])
def test_a_resumed_stage_ends_in_the_same_weights(tmp_path: Path, stop: int) -> None:
    for name in ("whole", "broken"):
        (tmp_path / name).mkdir()
    live(tmp_path / "broken", stop)
    whole, resumed = weights(live(tmp_path / "whole", 6)), weights(live(tmp_path / "broken", 6))
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert not torch.equal(whole["used.weight"], Net().used.weight)


def test_the_recipe_file_reads() -> None:
    recipe = StarterRecipe.read()
    assert set(recipe.data.base_styles) < set(recipe.data.judge_styles)
    assert "openmoji" not in recipe.data.base_styles, "the sample brand must stay unseen"
    assert set(recipe.data.groups) <= set(recipe.judge.groups)


def square(colour: tuple[int, int, int]) -> Tensor:
    rgba = torch.zeros(1, 4, 16, 16, dtype=torch.uint8)
    rgba[:, :3] = torch.tensor(colour)[None, :, None, None]
    rgba[:, 3] = 255
    return rgba


@pytest.mark.parametrize("background", BACKGROUNDS)
def test_a_scene_shows_its_object_on_its_background(background: str) -> None:
    picture = paint(square((10, 20, 30)), Scene("noto", background, ((0, 0.5, 0.5, 0.5),)), 32)
    assert picture[:, 16, 16].tolist() == [10, 20, 30]
    assert picture[:, 1, 1].tolist() == list(BACKGROUNDS[background])


def test_positions_are_where_the_words_say() -> None:
    drawings = torch.cat([square((255, 0, 0)), square((0, 0, 255))])
    rng = random.Random(0)
    seen = set()
    for _ in range(40):
        scene = pair(rng, 0, 1, "noto")
        picture = paint(drawings, scene, 64).float()
        red = (picture[0] == 255) & (picture[1] == 0) & (picture[2] == 0)
        blue = (picture[2] == 255) & (picture[0] == 0) & (picture[1] == 0)
        (ry, rx), (by, bx) = (mask.nonzero().float().mean(0) for mask in (red, blue))
        holds = {"left of": rx < bx, "right of": rx > bx, "above": ry < by, "below": ry > by}
        assert holds[scene.relation]
        seen.add(scene.relation)
    assert len(seen) == 4


def test_captions_say_concept_count_position_background_and_style() -> None:
    captions, rng = Captions(CONCEPTS), random.Random(3)
    texts: list[str] = []
    for _ in range(200):
        scene = several(rng, 0, "noto")
        text = captions.caption(rng, scene)
        count = {2: "two", 3: "three", 4: "four"}[len(scene.objects)]
        assert text.startswith(count)
        assert scene.background == "white" or f"{scene.background} background" in text
        texts.append(text)
    assert 0.8 < sum(text.endswith("noto style") for text in texts) / len(texts) < 1
    both = captions.caption(rng, pair(rng, 1, 2, "noto"))
    assert any(relation in both for relation in ("left of", "right of", "above", "below"))


def test_synonyms_mean_one_concept_only() -> None:
    assert Captions(CONCEPTS).synonyms == [["apple", "fruit"], ["kitty"], []]


@pytest.mark.parametrize(
    ("name", "one", "many"),
    [("red apple", "a red apple", "red apples"), ("otter", "an otter", "otters"),
     ("cherry", "a cherry", "cherries"), ("fox", "a fox", "foxes"), ("grapes", "a grapes", "grapes")],
)  # fmt: skip
def test_articles_and_plurals(name: str, one: str, many: str) -> None:
    assert (article(name), plural(name)) == (one, many)


def test_single_objects_stay_inside() -> None:
    rng = random.Random(1)
    for _ in range(100):
        ((_, x, y, side),) = single(rng, 0, "noto").objects
        assert side / 2 <= x <= 1 - side / 2
        assert side / 2 <= y <= 1 - side / 2


def test_wide_icons_are_centred_in_a_square() -> None:
    svg = square_svg({"width": 20, "height": 10}, {"body": "<rect/>"})
    assert 'viewBox="0.0 -5.0 20 20"' in svg


def test_outlines_surround_the_shape() -> None:
    rgba = torch.zeros(4, 9, 9, dtype=torch.uint8)
    rgba[:, 4, 4] = 255
    drawn = vae.outlined(rgba, 2, torch.zeros(3))
    assert (drawn[3] == 255).sum() == 25
    assert drawn[:3, 4, 4].tolist() == [255, 255, 255]
    assert drawn[:3, 2, 2].tolist() == [0, 0, 0]


def test_psnr_is_in_decibels_of_a_range_of_two() -> None:
    a = torch.zeros(2, 3, 4, 4)
    assert vae.psnr(a, a + 0.2).tolist() == pytest.approx([20.0, 20.0], abs=1e-4)


def test_slugs_are_file_names() -> None:
    assert brand.slug("piñata & co") == "piata---co"


def test_averaged_weights_are_there_for_a_while_only(tmp_path: Path) -> None:
    job = live(tmp_path, 3)
    before = {name: value.clone() for name, value in job.module.state_dict().items()}
    with job.averaged():
        inside = job.module.state_dict()
        assert all(torch.equal(inside[name], job.average[name]) for name in before)
        assert not torch.equal(inside["used.weight"], before["used.weight"])
    assert all(torch.equal(value, before[name]) for name, value in job.module.state_dict().items())
