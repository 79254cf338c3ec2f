"""Nouns: frozen, strict, with ids that are the hash of their content."""

import hashlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from livery.nouns import (
    STORED,
    Dataset,
    Event,
    LiveryError,
    LowRankSpec,
    Note,
    Photo,
    Progress,
    Recipe,
    Step,
    with_trigger,
)

SHA = "0" * 64
PHOTO = Photo(sha256=SHA, width=2, height=3, captions=("a cat", "one cat"))


def test_an_id_is_the_hash_of_the_canonical_json() -> None:
    dataset = Dataset(name="d", photos=(PHOTO,))
    text = json.dumps(dataset.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
    assert dataset.id == hashlib.sha256(text.encode()).hexdigest()
    assert dataset.id == Dataset.model_validate_json(dataset.model_dump_json()).id
    assert dataset.id != dataset.model_copy(update={"name": "e"}).id


def test_nouns_are_frozen() -> None:
    with pytest.raises(ValidationError):
        PHOTO.width = 5


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        ({"lerning_rate": 1}, "unknown key 'lerning_rate': did you mean 'learning_rate'?"),
        ({"tuners": [{"rnak": 4}]}, "tuners.0: unknown key 'rnak': did you mean 'rank'?"),
        ({"zzzz": 1}, "unknown key 'zzzz': known keys:"),
        ({"steps": -1}, "steps: Input should be greater than 0"),
        ({"learning_rate": float("nan")}, "learning_rate: "),
        ({"precision": "fp8"}, "precision: Input should be 'auto', 'fp32', 'bf16' or 'fp16'"),
    ],
)
def test_bad_input_is_one_sentence_that_names_the_key(data: dict[str, object], complaint: str) -> None:
    with pytest.raises(LiveryError) as caught:
        Recipe.parse(data, "recipe.toml")
    assert str(caught.value).startswith("recipe.toml: ")
    assert complaint in str(caught.value)
    assert "\n" not in str(caught.value)


@given(st.integers(1, 512), st.floats(1e-6, 1), st.text(max_size=20))
def test_a_recipe_survives_json(rank: int, rate: float, trigger: str) -> None:
    recipe = Recipe(tuners=(LowRankSpec(rank=rank),), learning_rate=rate, trigger=trigger)
    again = Recipe.model_validate_json(recipe.model_dump_json())
    assert again == recipe
    assert again.id == recipe.id


@pytest.mark.parametrize(
    "event", [Progress(stage="s", done=1, total=2), Note(text="t"), Step(step=1, loss=0.5, learning_rate=0)]
)
def test_events_are_told_apart_by_their_kind(event: Event) -> None:
    adapter: TypeAdapter[Event] = TypeAdapter(Event)
    assert adapter.validate_json(event.model_dump_json()) == event


def test_splits_keep_the_order() -> None:
    photos = tuple(
        PHOTO.model_copy(update={"sha256": f"{n:064x}", "split": "validation" if n % 2 else "train"})
        for n in range(6)
    )
    dataset = Dataset(name="d", photos=photos)
    assert [int(photo.sha256, 16) for photo in dataset.split("validation")] == [1, 3, 5]
    assert dataset.split("test") == ()


def test_the_store_keeps_these_kinds() -> None:
    assert set(STORED) == {"Dataset", "Estimate", "Adapter", "Run", "Suite", "Report"}


@pytest.mark.parametrize(
    ("caption", "trigger", "expected"),
    [
        ("a cat", "acme style", "a cat, acme style"),
        ("a cat in ACME style", "acme style", "a cat in ACME style"),
        ("", "acme style", "acme style"),
        ("a cat", "", "a cat"),
    ],
)
def test_the_trigger_stands_behind_the_caption_once(caption: str, trigger: str, expected: str) -> None:
    assert with_trigger(caption, trigger) == expected
