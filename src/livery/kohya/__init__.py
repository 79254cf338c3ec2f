"""Configurations of kohya's trainers as recipes, with a table of what became of every key.

Reads sd-scripts' TOML (sections are ignored, as sd-scripts does) and the JSON that the kohya_ss GUI saves.
The recipe trains as kohya would: alpha is kept, so learning rates need no correction; the table shows what
each rate would be at alpha = rank.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from livery.kohya.network import tuner
from livery.kohya.rows import captions, loss, noise, pictures
from livery.kohya.settings import Became, ImportedKey, read_settings
from livery.kohya.training import base_and_family, memory, optimizer, prior, run, say_what_is_left
from livery.nouns import Noun, Recipe

__all__ = ["Became", "Imported", "ImportedKey", "import_recipe"]


class Imported(Noun):
    """A recipe and what became of each key of the file that it was made from."""

    recipe: Recipe
    keys: tuple[ImportedKey, ...]
    idle: int = 0
    """Keys that were empty or off, and so are not listed."""


def import_recipe(path: Path, *, family: str | None = None, alpha_as_rank: bool = False) -> Imported:
    """The recipe that trains what this kohya configuration trains.

    `family` ("sd1", "sdxl", "sd3") says what the base is, where the file does not. With `alpha_as_rank`,
    alpha becomes the rank and the learning rates are multiplied with alpha / rank: equal to first order under
    Adam-like optimisers, for those who want to compare with recipes written that way.

    Raises LiveryError for a file that cannot be read, is of another model than livery trains, or holds a
    value that is not what its key takes.
    """
    settings = read_settings(path)
    values: dict[str, Any] = base_and_family(settings, family)
    values |= run(settings)
    values["pictures"] = pictures(settings)
    values["captions"], trigger = captions(settings)
    values |= {"trigger": trigger} if trigger else {}
    values["optimizer"] = optimizer(settings, values)
    values["tuners"] = [tuner(settings, values, alpha_as_rank=alpha_as_rank)]
    values["loss"] = loss(settings, str(values.get("family")))
    values["noise"] = noise(settings, str(values.get("family")))
    values |= prior(settings)
    values["memory"] = memory(settings, values)
    values["stop"] = {"keep": "last"}
    idle = say_what_is_left(settings)
    return Imported(recipe=Recipe.parse(values, str(path)), keys=tuple(settings.table), idle=idle)
