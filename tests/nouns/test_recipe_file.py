"""A recipe written as TOML is read back equal."""

import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from livery.nouns import (
    CaptionsSpec,
    FullSpec,
    LiveryError,
    LowRankSpec,
    NoiseSpec,
    OptimizerSpec,
    PicturesSpec,
    PluginSpec,
    PriorSpec,
    Recipe,
    TokensSpec,
    TunerSpec,
    read_recipe,
    recipe_toml,
)

TEXT = st.text(max_size=12)
RATE = st.floats(1e-12, 1e12)
TUNERS: st.SearchStrategy[TunerSpec] = st.one_of(
    st.builds(
        LowRankSpec,
        rank=st.integers(1, 9),
        alpha=st.none() | RATE,
        targets=st.none() | TEXT,
        ranks=st.dictionaries(TEXT, st.integers(1, 9), max_size=2),
        towers=st.dictionaries(TEXT, RATE, max_size=2),
        rslora=st.booleans(),
    ),
    st.builds(FullSpec, targets=TEXT, learning_rate=st.none() | RATE),
    st.builds(PluginSpec, kind=st.just("mine"), settings=st.dictionaries(TEXT, TEXT | st.booleans() | RATE)),
)


def plain_zero(number: float) -> float:
    """-0.0 is equal to 0.0, and so not written where that is the default; only its text differs."""
    return number + 0.0


RECIPES = st.builds(
    Recipe,
    base=TEXT,
    tuners=TUNERS.map(lambda spec: (spec,)),
    trigger=TEXT,
    steps_per_photo=st.none() | RATE,
    learning_rate=RATE,
    sample_prompts=st.lists(TEXT, max_size=3).map(tuple),
    pictures=st.builds(PicturesSpec, resolutions=st.lists(st.integers(1, 2048)).map(tuple)),
    captions=st.builds(CaptionsSpec, separator=st.text(min_size=1, max_size=3), dropout=st.floats(0, 1)),
    noise=st.builds(NoiseSpec, offset=RATE, logit_mean=st.floats(-1e6, 1e6).map(plain_zero)),
    optimizer=st.builds(OptimizerSpec, betas=st.none() | st.tuples(st.floats(0, 1), st.floats(0, 1))),
    prior=st.builds(PriorSpec, kind=st.just("photos"), prompt=st.text(min_size=1)),
)


@given(RECIPES)
def test_written_and_read_it_is_equal(recipe: Recipe) -> None:
    again = Recipe.parse(tomllib.loads(recipe_toml(recipe)), "recipe.toml")
    assert again == recipe
    assert again.id == recipe.id


def test_several_tuners_keep_their_order() -> None:
    words = TokensSpec(tokens={'"<a b>"\\': "x\ny\x7f"})
    recipe = Recipe(tuners=(words, LowRankSpec(targets="a"), LowRankSpec(rank=3, targets="b")))
    assert Recipe.parse(tomllib.loads(recipe_toml(recipe)), "r") == recipe


def test_only_what_was_chosen_is_written() -> None:
    assert tomllib.loads(recipe_toml(Recipe())) == {"version": 2}
    text = recipe_toml(Recipe(seed=3, noise=NoiseSpec(offset=0.1)), head="# mine\n# alone")
    assert text == "# mine\n# alone\nversion = 2\nseed = 3\n\n[noise]\noffset = 0.1\n"


def test_reading_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    for content, sentence in (
        (b"steps = ", "cannot be read"),
        (b"\xff", "cannot be read"),
        (b"x = 1", "unknown key"),
    ):
        path.write_bytes(content)
        with pytest.raises(LiveryError, match=sentence) as caught:
            read_recipe(path)
        assert str(path) in str(caught.value)
    with pytest.raises(LiveryError, match="cannot be read"):
        read_recipe(tmp_path / "none.toml")
