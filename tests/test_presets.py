"""Presets: every one can be read, says when to use it and whence its figures, and raises no doubt."""

import pytest
from typer.testing import CliRunner

from livery import cli, presets
from livery.nouns import LiveryError, LowRankSpec, Recipe, TokensSpec, recipe_toml

NAMES = presets.names()
METHODS = ("lora", "dreambooth", "dreambooth-full", "textual-inversion", "pivotal", "full")


def test_every_family_has_every_method() -> None:
    wanted = {f"{family}-{method}" for family in ("sd1", "sdxl", "sd3") for method in METHODS}
    assert wanted <= set(NAMES)
    assert {f"starter-{method}" for method in METHODS if method != "dreambooth-full"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_preset_is_a_recipe_without_doubts(name: str) -> None:
    recipe = presets.read(name)
    assert recipe.warnings() == ()
    assert recipe.fitted(30).warnings() == ()
    assert recipe.family == ("sd1" if name.startswith("starter") else name.split("-")[0])
    assert recipe.loss.weighting == ("none" if name.startswith(("sd3", "starter")) else "min-snr")
    assert Recipe.parse(recipe.model_dump(), name) == recipe


@pytest.mark.parametrize("name", NAMES)
def test_a_preset_says_when_to_use_it_and_whence_its_figures(name: str) -> None:
    text, about = presets.text(name), presets.describe(name).about
    assert 40 < len(about) < 400
    assert "figures" in text.split("version = 2")[0].casefold()
    assert all(len(line) <= 120 for line in text.splitlines())


@pytest.mark.parametrize("name", NAMES)
def test_a_preset_trains_what_its_name_says(name: str) -> None:
    recipe = presets.read(name)
    kinds = [spec.kind for spec in recipe.tuners]
    method = name.split("-", 1)[1]
    assert (recipe.prior.kind != "none") == ("dreambooth" in method)
    words = [word for spec in recipe.tuners if isinstance(spec, TokensSpec) for word in spec.tokens]
    assert all(word in recipe.trigger for word in words), "or no caption would hold the word"
    if method == "pivotal":
        assert kinds == ["tokens", "lora"]
    elif method == "textual-inversion":
        assert kinds == ["tokens"]
    else:
        assert kinds == [
            "full" if method.endswith("full") else method.split("-")[0].replace("dreambooth", "lora")
        ]


def test_steps_follow_the_pictures() -> None:
    recipe = presets.read("sdxl-lora")
    assert [recipe.fitted(n).steps for n in (5, 30, 500)] == [600, 1800, 3000]


def test_the_starters_preset_is_the_demos_tuner() -> None:
    from livery.nouns import read_recipe
    from livery.starter import DEMO_RECIPE

    assert presets.read("starter-lora").tuners == read_recipe(DEMO_RECIPE).tuners
    assert isinstance(presets.read("starter-lora").tuners[0], LowRankSpec)


def test_an_unknown_preset_names_the_nearest() -> None:
    with pytest.raises(LiveryError, match="no preset is called 'sdxl-lorra': did you mean 'sdxl-lora'"):
        presets.read("sdxl-lorra")


def test_the_command_lists_them_and_prints_a_file_that_reads_back() -> None:
    listed = CliRunner().invoke(cli.app, ["presets", "--json"])
    assert [line.count('"name"') for line in listed.stdout.splitlines()] == [1] * len(NAMES)
    table = CliRunner().invoke(cli.app, ["presets"])
    assert all(name in table.stdout for name in NAMES)
    shown = CliRunner().invoke(cli.app, ["presets", "sd3-full"])
    assert shown.stdout == presets.text("sd3-full")
    assert recipe_toml(presets.read("sd3-full")).startswith("# A livery recipe.")


def test_a_run_has_one_recipe() -> None:
    result = CliRunner().invoke(cli.app, ["train", "recipe.toml", "--preset", "sd1-lora", "--data", "x"])
    assert isinstance(result.exception, LiveryError)
    assert "name one of them" in str(result.exception)
