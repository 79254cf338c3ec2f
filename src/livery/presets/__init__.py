"""Presets: recipes that experienced users converge on, one TOML file per family and method.

A name is <family>-<method>, as in "sdxl-lora". The comment at the head of each file says when to use it and
where its figures come from.
"""

from __future__ import annotations

import difflib
import itertools
import tomllib
from importlib import resources

from livery.nouns import LiveryError, Noun, Recipe


class Preset(Noun):
    """A preset for people to choose from."""

    name: str
    about: str
    text: str


def names() -> tuple[str, ...]:
    """The names of all presets, sorted."""
    files = (path.name for path in resources.files(__name__).iterdir())
    return tuple(sorted(name.removesuffix(".toml") for name in files if name.endswith(".toml")))


def text(name: str) -> str:
    """A preset's file as it is, comments included. Raises LiveryError with the nearest name."""
    known = names()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        hint = f"did you mean '{near[0]}'?" if near else f"there are {', '.join(known)}."
        raise LiveryError(f"no preset is called '{name}': {hint}")
    return (resources.files(__name__) / f"{name}.toml").read_text(encoding="utf-8")


def read(name: str) -> Recipe:
    """A preset as a recipe. Raises LiveryError with the nearest name."""
    return Recipe.parse(tomllib.loads(text(name)), f"preset {name}")


def describe(name: str) -> Preset:
    """A preset with what its file says first: when to use it, on one line."""
    found = text(name)
    head = itertools.takewhile(lambda line: line.startswith("#"), found.splitlines())
    about = " ".join(line.removeprefix("#").strip() for line in head).split(" Figures: ")[0]
    return Preset(name=name, about=about, text=found)
