"""Captions: kept tags stay, others move or go; the forms of a text are always the same ones."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from livery.nouns import CaptionsSpec, Photo, Recipe, with_trigger
from livery.train.captions import form, forms, placed, plain, random_of, texts_of

TAGS = "acme, " + ", ".join(f"tag {i}" for i in range(10))


def recipe(trigger: str = "", **captions: object) -> Recipe:
    return Recipe(trigger=trigger, captions=CaptionsSpec.model_validate(captions))


def test_without_anything_that_varies_there_is_one_form_as_it_was_written():
    asked = recipe()
    assert forms(asked) == 1
    assert form(" a,b ,  c", 0, asked) == " a,b ,  c"


def test_shuffled_forms_hold_every_tag_behind_the_kept_ones():
    asked = recipe(shuffle_tags=True, keep_tags=3, variants=16)
    made = [form(TAGS, number, asked).split(", ") for number in range(forms(asked))]
    assert forms(asked) == 16
    assert all(tags[:3] == ["acme", "tag 0", "tag 1"] for tags in made)
    assert all(Counter(tags) == Counter(TAGS.split(", ")) for tags in made)
    assert len({tuple(tags) for tags in made}) == 16


def test_each_tag_comes_to_each_place():
    asked = recipe(shuffle_tags=True, keep_tags=0, variants=600)
    places = Counter(form("a, b, c", number, asked) for number in range(600))
    assert len(places) == 6
    assert max(places.values()) < 140
    assert min(places.values()) > 65


def test_tags_are_left_out_at_the_stated_share_and_the_kept_ones_never():
    asked = recipe(tag_dropout=0.3, keep_tags=2, variants=400)
    made = [form(TAGS, number, asked).split(", ") for number in range(400)]
    assert all(tags[:2] == ["acme", "tag 0"] for tags in made)
    for i in range(1, 10):
        assert 0.22 < 1 - sum(f"tag {i}" in tags for tags in made) / 400 < 0.38
    others = [tags[2:] for tags in made]
    assert all(tags == sorted(tags) for tags in others)  # not shuffled: their order stays


def test_all_others_may_go():
    assert form(TAGS, 3, recipe(tag_dropout=1.0)) == "acme"
    assert form(TAGS, 3, recipe(tag_dropout=1.0, keep_tags=0, trigger="x")) == "x"


def test_forms_hang_on_the_text_and_their_number_alone():
    asked = recipe(shuffle_tags=True)
    again = asked.model_copy(update={"seed": 9, "batch_size": 3})
    assert [form(TAGS, i, asked) for i in range(8)] == [form(TAGS, i, again) for i in range(8)]
    more = recipe(shuffle_tags=True, variants=20)
    assert [form(TAGS, i, asked) for i in range(8)] == [form(TAGS, i, more) for i in range(8)]


def test_another_separator_is_joined_as_it_was_split():
    assert form("a | b", 0, recipe(tag_dropout=0.0, shuffle_tags=True, keep_tags=2, separator="|")) == "a| b"
    asked = recipe(shuffle_tags=True, keep_tags=2, separator=" ; ")
    assert form("a ; b", 0, asked) == "a ; b"


@settings(deadline=None)
@given(st.text(max_size=60), st.integers(0, 7), st.integers(0, 4))
def test_no_form_holds_a_tag_that_the_caption_has_not(caption: str, number: int, keep: int):
    asked = recipe(shuffle_tags=True, tag_dropout=0.5, keep_tags=keep)
    tags = [tag.strip() for tag in caption.split(",") if tag.strip()]
    found = [tag for tag in form(caption, number, asked).split(", ") if tag]
    assert found[:keep] == tags[:keep]
    assert not Counter(found) - Counter(tags)


@pytest.mark.parametrize(
    ("caption", "place", "expected"),
    [
        ("a cat", "last", "a cat, acme style"),
        ("a cat", "first", "acme style, a cat"),
        ("", "first", "acme style"),
        ("an ACME Style cat", "first", "an ACME Style cat"),
    ],
)
def test_the_trigger_is_placed_unless_it_is_there(caption: str, place: str, expected: str):
    asked = recipe("acme style", trigger_place=place)
    assert placed(caption, asked) == expected
    if place == "last":
        assert placed(caption, asked) == with_trigger(caption, "acme style")


def test_the_trigger_is_in_every_form_also_when_its_own_tag_was_left_out():
    asked = recipe("tag 7", shuffle_tags=True, tag_dropout=0.9, trigger_place="first")
    made = [form(TAGS, number, asked).split(", ") for number in range(8)]
    assert all("tag 7" in tags for tags in made)
    assert any(tags[0] == "tag 7" for tags in made)


def test_texts_of_a_photo_are_all_forms_of_all_captions():
    photo = Photo(sha256="1" * 64, width=1, height=1, captions=("a, b, c", "d"))
    asked = recipe("x", shuffle_tags=True, variants=4)
    assert list(texts_of(photo, asked)) == [form(c, i, asked) for c in photo.captions for i in range(4)]
    assert list(texts_of(photo, recipe())) == ["a, b, c", "d"]
    assert list(texts_of(Photo(sha256="1" * 64, width=1, height=1), recipe("x"))) == ["x"]


def test_the_plain_caption_is_the_first_one_unshuffled():
    photo = Photo(sha256="1" * 64, width=1, height=1, captions=(TAGS, "other"))
    assert plain(photo, recipe("x", shuffle_tags=True, tag_dropout=0.9)) == f"{TAGS}, x"


def test_streams_of_neighbouring_names_are_unrelated():
    names = [(0, "a", 1), (0, "a", 2), (1, "a", 1), (0, "a1")]
    assert len({random_of(*name).initial_seed() for name in names}) == len(names)
