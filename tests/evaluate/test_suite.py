"""Suites from TOML and from a dataset's held-out photos."""

from pathlib import Path

import pytest

from livery.evaluate.suite import STYLE_PROMPTS, derive_suite, read_suite
from livery.nouns import Dataset, LiveryError, Photo

TEXT = """
style = "ours"
styles = ["ours", "theirs"]
references = ["a.png"]
style_prompts = ["{prompt}, line art"]
[[questions]]
prompt = "a cat"
concept = "cat"
reference = "b.png"
[[tuning]]
prompt = "a dog"
"""


def blob(path: Path) -> str:
    return {"a.png": "a" * 64, "b.png": "b" * 64}[path.name]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(b"")
    return tmp_path


def write(folder: Path, text: str) -> Path:
    path = folder / "things.toml"
    path.write_text(text)
    return path


def test_pictures_are_named_by_file_and_become_blobs(folder: Path) -> None:
    suite = read_suite(write(folder, TEXT), blob)
    assert suite.name == "things"
    assert suite.references == ("a" * 64,)
    assert suite.questions[0].reference == "b" * 64
    assert suite.tuning[0].reference is None


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (TEXT.replace("b.png", "c.png"), "there is no picture 'c.png'"),
        (TEXT.replace("b.png", "../b.png"), "outside the suite's folder"),
        (TEXT.replace("concept", "koncept"), "unknown key 'koncept': did you mean 'concept'?"),
        ("style = ", "cannot be read as a suite"),
        ('questions = "a cat"', "questions must be tables"),
    ],
)
def test_a_bad_suite_is_one_sentence(folder: Path, text: str, complaint: str) -> None:
    path = write(folder, text)
    with pytest.raises(LiveryError, match=r"things\.toml") as caught:
        read_suite(path, blob)
    assert complaint in str(caught.value)


def photo(number: int, split: str, caption: str) -> Photo:
    captions = (caption,) if caption else ()
    return Photo.model_validate(
        {"sha256": f"{number:064x}", "width": 1, "height": 1, "captions": captions, "split": split}
    )


def test_held_out_captions_are_asked_and_training_photos_are_the_style() -> None:
    photos = (photo(1, "train", "a cat"), photo(2, "validation", "a dog"), photo(3, "validation", ""))
    suite = derive_suite(Dataset(name="d", photos=photos))
    assert [(q.prompt, q.reference) for q in suite.questions] == [("a dog", f"{2:064x}")]
    assert [q.prompt for q in suite.tuning] == ["a cat"]
    assert suite.references == (f"{1:064x}",)
    assert suite.style_prompts == STYLE_PROMPTS
    assert len(STYLE_PROMPTS) >= 16


def test_no_reported_caption_is_tuned_on() -> None:
    photos = (photo(1, "train", "a cat"), photo(2, "validation", "a cat"), photo(4, "train", "a fox"))
    suite = derive_suite(Dataset(name="d", photos=photos))
    assert [q.prompt for q in suite.tuning] == ["a fox"]


def test_nothing_held_out_says_what_to_do() -> None:
    with pytest.raises(LiveryError, match=r"--validation 0\.2"):
        derive_suite(Dataset(name="d", photos=(photo(1, "train", "a cat"),)))
