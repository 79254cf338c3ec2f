"""The recipe: strict, versioned, migrated, with contradictions named."""

import json
from collections.abc import Mapping
from typing import Any

import pytest

from livery.nouns import (
    AdapterCard,
    FullSpec,
    LiveryError,
    LossSpec,
    LowRankSpec,
    OptimizerSpec,
    PicturesSpec,
    PluginSpec,
    Recipe,
    Run,
    TokensSpec,
)

SHA = "0" * 64
# As version 1 wrote it into adapters: every key, flat.
VERSION_1: Mapping[str, Any] = {
    "base": "starter",
    "family": None,
    "tuners": [{"kind": "lora", "rank": 4, "alpha": 8.0, "targets": "x"}],
    "trigger": "acme",
    "resolution": 96,
    "steps": 300,
    "batch_size": 4,
    "accumulate": 2,
    "learning_rate": 0.002,
    "schedule": "constant",
    "warmup_steps": 7,
    "weight_decay": 0.5,
    "clip_norm": 2.0,
    "min_snr_gamma": 3.0,
    "caption_dropout": 0.25,
    "precision": "bf16",
    "validate_every": 10,
    "sample_every": 20,
    "sample_prompts": ["a cat"],
    "checkpoint_every": 30,
    "seed": 5,
}
MIGRATED = Recipe(
    tuners=(LowRankSpec(rank=4, alpha=8, targets="x"),),
    trigger="acme",
    steps=300,
    batch_size=4,
    accumulate=2,
    learning_rate=0.002,
    precision="bf16",
    validate_every=10,
    sample_every=20,
    sample_prompts=("a cat",),
    checkpoint_every=30,
    seed=5,
    pictures=PicturesSpec(resolutions=(96,), buckets=False),
    captions={"dropout": 0.25},  # pyright: ignore[reportArgumentType]
    loss=LossSpec(min_snr_gamma=3),
    optimizer=OptimizerSpec(schedule="constant", warmup_steps=7, weight_decay=0.5, clip_norm=2),
    stop={"keep": "last"},  # pyright: ignore[reportArgumentType]
)


def complaint(values: Mapping[str, Any]) -> str:
    with pytest.raises(LiveryError) as caught:
        Recipe.parse(values, "recipe.toml")
    assert str(caught.value).startswith("recipe.toml: ")
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ----------------------------------------------------------------------------- versions


@pytest.mark.parametrize("named", [{}, {"version": 1}], ids=["told by its keys", "told by its version"])
def test_version_1_becomes_version_2(named: Mapping[str, Any]) -> None:
    assert Recipe.parse({**VERSION_1, **named}, "r") == MIGRATED


def test_version_1_could_leave_the_resolution_and_the_weighting_out() -> None:
    found = Recipe.parse({**VERSION_1, "resolution": None, "min_snr_gamma": 0.0}, "r")
    assert found.pictures.resolutions == ()
    assert found.loss == LossSpec(weighting="none")


def test_an_old_recipe_inside_a_card_and_a_run_is_migrated() -> None:
    card = {
        "recipe": VERSION_1,
        "family": "sd1",
        "base_sha256": SHA,
        "dataset": SHA,
        "livery_version": "0.1.0",
        "step": 300,
    }
    assert AdapterCard.parse(card, "adapter").recipe == MIGRATED
    run = {
        "recipe": VERSION_1,
        "dataset": SHA,
        "base_sha256": SHA,
        "adapter": SHA,
        "steps": [],
        "validations": [],
        "seconds": 1,
        "peak_memory_bytes": 1,
        "device": "cpu",
    }
    assert Run.model_validate_json(json.dumps(run)).recipe == MIGRATED


def test_migrating_changes_nothing_in_what_was_given() -> None:
    given = json.dumps(VERSION_1)
    values = json.loads(given)
    Recipe.parse(values, "r")
    assert json.dumps(values) == given


def test_a_recipe_of_today_is_not_migrated() -> None:
    for recipe in (Recipe(), MIGRATED):
        assert Recipe.parse(recipe.model_dump(), "r") == recipe
        assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"version": 3}, "recipe version 3 is newer than 2, the newest this livery reads: update livery"),
        ({"version": 0}, "version: "),
        ({"version": 1, "loss": {}}, "version 1 had no sections, this recipe has: write version = 2"),
        ({"version": 1, "lerning_rate": 1}, "unknown key 'lerning_rate': did you mean 'learning_rate'?"),
        ({"version": 2, "warmup_steps": 3}, "unknown key 'warmup_steps': it stands in [optimizer]"),
        (
            {"warmup_steps": 3, "pictures": {"flip": 1}},
            "unknown key 'warmup_steps': it stands in [optimizer]",
        ),
    ],
)
def test_versions_that_cannot_be_read(values: Mapping[str, Any], sentence: str) -> None:
    assert sentence in complaint(values)


def test_a_future_recipe_inside_a_card_says_so() -> None:
    with pytest.raises(LiveryError, match=r"a\.safetensors: recipe: recipe version 9 is newer than"):
        AdapterCard.parse({"recipe": {"version": 9, "news": True}}, "a.safetensors")


# ----------------------------------------------------------------------------- unknown keys


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"optimizer": {"wieght_decay": 1}}, "optimizer: unknown key 'wieght_decay': did you mean"),
        (
            {"captions": {"shufle_tags": True}},
            "captions: unknown key 'shufle_tags': did you mean 'shuffle_tags'?",
        ),
        ({"optimizer": {"learning_rate": 1}}, "optimizer: unknown key 'learning_rate': it stands at the top"),
        ({"loss": {"offset": 0.1}}, "loss: unknown key 'offset': it stands in [noise]"),
        ({"flip": 0.5}, "unknown key 'flip': it stands in [pictures]"),
        ({"rank": 4}, "unknown key 'rank': it stands in [[tuners]]"),
        ({"tuners": [{"rnak": 4}]}, "tuners.0: unknown key 'rnak': did you mean 'rank'?"),
        (
            {"tuners": [{}, {"kind": "full", "rank": 4}]},
            "tuners.1: key 'rank' belongs to kind 'lora', this one",
        ),
        ({"tuners": [{"tokens": {"<a>": "b"}}]}, "tuners.0: key 'tokens' belongs to kind 'tokens'"),
        (
            {"tuners": [{"kind": "lorra", "rank": 4}]},
            "tuners.0: unknown kind 'lorra': did you mean 'lora'? Known",
        ),
        (
            {"tuners": [{"kind": "zzz", "q": 4}]},
            "Known are lora, loha, lokr, oft, full, tokens; a plug-in's kind",
        ),
        ({"tuners": [{"kind": "lora", "dropout": 2}]}, "tuners.0.dropout: Input should be less than"),
        ({"tuners": []}, "tuners: "),
    ],
)
def test_unknown_keys_are_found_where_they_belong(values: Mapping[str, Any], sentence: str) -> None:
    assert sentence in complaint(values)


def test_a_plug_in_takes_what_it_likes_in_settings() -> None:
    recipe = Recipe.parse({"tuners": [{"kind": "mine", "settings": {"power": 3, "deep": True}}]}, "r")
    assert recipe.tuners == (PluginSpec(kind="mine", settings={"power": 3, "deep": True}),)


# ----------------------------------------------------------------------------- contradictions

TOKENS = {"kind": "tokens", "tokens": {"<acme>": "shoe"}}


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"prior": {"kind": "photos"}}, "prior.prompt is empty: name the class"),
        ({"prior": {"prompt": "a dog"}}, "prior.prompt is read only where prior.kind is"),
        ({"prior": {"kind": "photos", "prompt": "a dog"}, "tuners": [TOKENS]}, "kind 'tokens' changes none"),
        ({"noise": {"offset": 0.1, "pyramid": 0.3}}, "noise.pyramid and noise.offset both"),
        ({"noise": {"timesteps": "uniform", "logit_std": 2}}, "noise.logit_std is read only where"),
        ({"loss": {"weighting": "none", "min_snr_gamma": 1}}, "loss.min_snr_gamma is read only where"),
        ({"loss": {"huber_delta": 1}}, "loss.huber_delta is read only where loss.kind is 'huber'"),
        ({"optimizer": {"restarts": 2}}, "optimizer.restarts is read only where"),
        ({"optimizer": {"kind": "adafactor", "betas": [0.9, 0.9]}}, "adafactor has none"),
        ({"captions": {"keep_tags": 2}}, "captions.keep_tags is read only where"),
        ({"pictures": {"buckets": False, "max_ratio": 2}}, "pictures.max_ratio is read only where"),
        ({"pictures": {"unmasked_weight": 0.1}}, "pictures.unmasked_weight is read only where"),
        ({"stop": {"patience": 2}, "validate_every": 0}, "stop.patience is read only where validate_every"),
        ({"min_steps": 5, "max_steps": 4}, "min_steps 5 is above max_steps 4"),
        ({"tuners": [{"dora": True}], "memory": {"weights": "int8"}}, "dora takes the lengths"),
        ({"tuners": [{"kind": "full"}], "memory": {"weights": "int4"}}, "freezes the base"),
        ({"tuners": [{"kind": "full"}], "memory": {"weights": "fp16"}}, "loses the small steps"),
        ({"tuners": [{"kind": "full"}, {"kind": "lora"}]}, "would train the same layers"),
        ({"tuners": [{"kind": "full", "targets": "a"}, {"kind": "full"}]}, "kind 'full' is named twice"),
        ({"tuners": [{"targets": "a"}, {"rank": 4}]}, "kind 'lora' is named twice, once without targets"),
        ({"memory": {"fused_backward": True}}, "is for kind 'full' alone"),
        (
            {"tuners": [{"kind": "full"}], "memory": {"fused_backward": True}, "accumulate": 2},
            "set accumulate to 1",
        ),
        (
            {"tuners": [{"kind": "full"}], "memory": {"fused_backward": True}, "optimizer": {"ema": 0.9}},
            "keep one of them",
        ),
        (
            {"tuners": [TOKENS], "trigger": "Acme"},
            "trigger 'Acme' is not the new word: write trigger = '<acme>'",
        ),
        ({"tuners": [{"kind": "tokens", "tokens": {"ac": "a", "acme": "b"}}]}, "is part of 'acme'"),
        ({"tuners": [TOKENS, TOKENS]}, "is part of"),
        (
            {"tuners": [{"kind": "tokens", "tokens": {"a,b": "a"}}], "captions": {"shuffle_tags": True}},
            "would be shuffled apart",
        ),
        ({"tuners": [TOKENS], "captions": {"dropout": 1}}, "leaves no caption"),
        ({"tuners": [{"kind": "loha", "dora": True}]}, "dora belongs to kind 'lora'"),
        ({"tuners": [{"kind": "oft", "alpha": 1}]}, "has no alpha"),
        ({"tuners": [{"kind": "tokens", "tokens": {}}]}, "tokens is empty"),
    ],
)
def test_contradictions_are_named(values: Mapping[str, Any], sentence: str) -> None:
    assert sentence in complaint(values)


@pytest.mark.parametrize(
    "values",
    [
        {"tuners": [TOKENS], "trigger": "a photo of <acme>"},
        {"tuners": [TOKENS], "trigger": "acme style"},
        {"tuners": [TOKENS, {"kind": "lora"}], "prior": {"kind": "prediction", "prompt": "a shoe"}},
        {"tuners": [{"kind": "full", "targets": "a.*"}, {"kind": "lora", "targets": "b.*"}]},
        {"captions": {"keep_tags": 2, "tag_dropout": 0.1}},
        {"stop": {"patience": 2}},
        {"tuners": [{"kind": "full"}], "memory": {"weights": "bf16", "fused_backward": True}},
    ],
)
def test_what_fits_together_is_taken(values: Mapping[str, Any]) -> None:
    Recipe.parse(values, "r")


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"optimizer": {"kind": "prodigy"}, "learning_rate": 1e-4}, "learning_rate is 0.0001, but prodigy"),
        ({"learning_rate": 1.0}, "learning_rate is 1, which only prodigy takes"),
        ({"tuners": [{"alpha": 1, "rank": 128}], "learning_rate": 1e-4}, "acts like 7.8e-07"),
        ({"tuners": [{"kind": "full"}], "learning_rate": 1e-3}, "0.001 is high for kind 'full'"),
        (
            {"tuners": [{"towers": {"text_encoder": 1e-2}}], "learning_rate": 1e-3},
            "text_encoder learns at 0.01, faster than the denoiser at 0.001",
        ),
        ({"steps": 20}, "optimizer.warmup_steps 20 is not below steps 20"),
        ({"steps": 200, "stop": {"patience": 2}}, "the run cannot end early"),
    ],
)
def test_what_is_seldom_meant_is_a_warning(values: Mapping[str, Any], sentence: str) -> None:
    found = Recipe.parse(values, "r").warnings()
    assert len(found) == 1
    assert sentence in found[0]


def test_ordinary_recipes_raise_no_doubt() -> None:
    assert Recipe().warnings() == ()
    prodigy = Recipe(learning_rate=1, optimizer=OptimizerSpec(kind="prodigy"))
    assert prodigy.warnings() == ()
    both = (TokensSpec(tokens={"<a>": "b"}, learning_rate=5e-3), FullSpec(learning_rate=1e-5))
    assert Recipe(tuners=both).warnings() == ()


# ----------------------------------------------------------------------------- steps


@pytest.mark.parametrize(("photos", "steps"), [(1, 100), (10, 150), (20, 300), (1000, 500)])
def test_steps_follow_the_number_of_photos_within_bounds(photos: int, steps: int) -> None:
    recipe = Recipe(steps_per_photo=15, min_steps=100, max_steps=500)
    fitted = recipe.fitted(photos)
    assert fitted.steps == steps
    assert fitted.fitted(7) == fitted, "what is fitted stays"
    assert Recipe(steps=7).fitted(photos).steps == 7
