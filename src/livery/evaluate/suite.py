"""Suites: read from a TOML file, or derived from a dataset's held-out photos."""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from livery.nouns import Dataset, LiveryError, Question, Suite

STYLE_PROMPTS = (
    "{prompt}, flat vector illustration",
    "{prompt}, line art with bold black outlines",
    "{prompt}, simple icon, flat colours",
    "{prompt}, cartoon style",
    "{prompt}, watercolour painting",
    "{prompt}, oil painting",
    "{prompt}, pencil sketch",
    "{prompt}, ink drawing",
    "{prompt}, pixel art",
    "{prompt}, 3d render, soft light",
    "{prompt}, isometric illustration",
    "{prompt}, minimal, pastel colours",
    "{prompt}, studio photograph, white background",
    "{prompt}, product photograph, soft shadows",
    "{prompt}, technical illustration",
    "{prompt}, children's book illustration",
)
"""What people try first on a general model; a suite of one's own names better ones."""


def read_suite(path: Path, put_picture: Callable[[Path], str]) -> Suite:
    """A suite from TOML, in which pictures are named by file, relative to the TOML file.

    `put_picture` stores a picture and returns its blob. Raises LiveryError naming the file and key.
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise LiveryError(f"{path}: cannot be read as a suite: {error}") from error

    def blob(name: object) -> str:
        return put_picture(_inside(path, str(name)))

    for table in ("questions", "tuning"):
        for question in _tables(values, table, path):
            if "reference" in question:
                question["reference"] = blob(question["reference"])
    if "references" in values:
        values["references"] = [blob(name) for name in values["references"]]
    return Suite.parse({"name": path.stem, **values}, str(path))


def derive_suite(dataset: Dataset) -> Suite:
    """Held-out captions as questions, their photos as the truth, the training photos as the style.

    Without a style prompt of the team's own, general ones stand in; they are chosen among on captions
    of the training photos. Raises LiveryError when no held-out photo has a caption.
    """
    held = [photo for photo in dataset.split("validation") if photo.caption]
    if not held:
        raise LiveryError(
            f"dataset {dataset.name} holds no captioned photo in its split 'validation': ingest it again "
            "with --validation 0.2, or give a suite"
        )
    asked = {photo.caption for photo in held}
    train = [photo for photo in dataset.split("train") if photo.caption not in asked]
    return Suite(
        name=f"held-out photos of {dataset.name}",
        questions=tuple(Question(prompt=photo.caption, reference=photo.sha256) for photo in held),
        tuning=tuple(Question(prompt=photo.caption) for photo in train[:12] if photo.caption),
        style_prompts=STYLE_PROMPTS if any(photo.caption for photo in train[:12]) else (),
        references=tuple(photo.sha256 for photo in train),
    )


def _inside(path: Path, name: str) -> Path:
    """The file that a suite names. Raises LiveryError when it is missing or outside the suite's folder."""
    file = (path.parent / name).resolve()
    if not file.is_relative_to(path.parent.resolve()):
        raise LiveryError(f"{path}: '{name}' lies outside the suite's folder; move it in")
    if not file.is_file():
        raise LiveryError(f"{path}: there is no picture '{name}' in its folder")
    return file


def _tables(values: dict[str, Any], key: str, path: Path) -> list[dict[str, Any]]:
    tables = values.get(key, [])
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise LiveryError(f"{path}: {key} must be tables, [[{key}]]")
    return tables
