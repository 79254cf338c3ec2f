"""The tokenizer that ships: CLIP's words and ids, against OpenAI's algorithm written out here."""

import itertools
import re
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import CLIPTokenizer

from livery.models import clip_vocabulary
from livery.models.clip_vocabulary import clip_tokenizer, is_clip_vocabulary
from livery.models.sd1 import SD1

WORDS = re.compile(r"'s|'t|'re|'ve|'m|'ll|'d|[a-z]+|[0-9]|[^\sa-z0-9]+")


@pytest.fixture(scope="module")
def tokenizer() -> CLIPTokenizer:
    return clip_tokenizer()


def test_the_vocabulary_is_that_of_clip(tokenizer: CLIPTokenizer):
    words = tokenizer.get_vocab()
    assert len(words) == len(tokenizer) == 49408
    assert sorted(words.values()) == list(range(49408))
    assert (words["<|startoftext|>"], words["<|endoftext|>"]) == (49406, 49407)
    assert (words["!"], words["a</w>"], words["the</w>"]) == (0, 320, 518)


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("a photo of a cat", [320, 1125, 539, 320, 2368]),
        ("A  Photo of a\nCAT", [320, 1125, 539, 320, 2368]),
        ("an astronaut riding a horse", [550, 18376, 6765, 320, 4558]),
        ("", []),
    ],
)
def test_known_encodings(tokenizer: CLIPTokenizer, text: str, ids: list[int]):
    assert tokenizer(text)["input_ids"] == [49406, *ids, 49407]


@settings(max_examples=60, deadline=None)
@given(st.text("abcdefghijklmnopqrstuvwxyz0123456789 .,!?'-", max_size=40))
def test_ascii_text_is_split_as_openai_splits_it(text: str):
    words, merges = clip_vocabulary._words()  # pyright: ignore[reportPrivateUsage]
    ranks = {pair: rank for rank, pair in enumerate(merges)}
    expected = [words[part] for word in WORDS.findall(text) for part in _merged(word, ranks)]
    assert _ids(text) == expected


@cache
def _tokenizer() -> CLIPTokenizer:
    return clip_tokenizer()


def _ids(text: str) -> list[int]:
    return _tokenizer()(text)["input_ids"][1:-1]


def _merged(word: str, ranks: dict[tuple[str, str], int]) -> list[str]:
    parts = [*word[:-1], f"{word[-1]}</w>"]
    while len(parts) > 1:
        best = min(itertools.pairwise(parts), key=lambda pair: ranks.get(pair, len(ranks)))
        if best not in ranks:
            break
        joined: list[str] = []
        for part in parts:  # leftmost first, as OpenAI's loop does
            if joined and (joined[-1], part) == best:
                joined[-1] = "".join(best)
            else:
                joined.append(part)
        parts = joined
    return parts


@pytest.mark.parametrize("text", ["π", "猫 и кошка", "naïve café", "👩‍🎨"])
def test_other_scripts_come_back_from_their_bytes(tokenizer: CLIPTokenizer, text: str):
    assert tokenizer.decode(tokenizer(text)["input_ids"][1:-1]) == text


def test_padding(tokenizer: CLIPTokenizer):
    own = tokenizer(["cat", "a cat"], padding="max_length", max_length=6)["input_ids"]
    assert own == [[49406, 2368, 49407, 49407, 49407, 49407], [49406, 320, 2368, 49407, 49407, 49407]]
    second = clip_tokenizer("!")(["cat"], padding="max_length", max_length=77)["input_ids"][0]
    assert second == [49406, 2368, 49407, *[0] * 74]


def test_another_vocabulary_is_told_apart(tokenizer: CLIPTokenizer):
    assert is_clip_vocabulary(clip_tokenizer("!"))
    assert not is_clip_vocabulary(SD1.tiny().tokenizers["text_encoder"])
