"""Recipes as TOML files: errors name file and key; what is written is only what was chosen."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from livery.nouns.base import LiveryError, Noun
from livery.nouns.recipe import SECTIONS, Recipe

HEAD = "# A livery recipe. Keys that are not here have the defaults of this version: see docs/recipes.md."


def read_recipe(path: Path) -> Recipe:
    """A recipe from a TOML file. Raises LiveryError naming the file and the key."""
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise LiveryError(f"{path}: cannot be read as a recipe: {error}") from error
    return Recipe.parse(values, str(path))


def recipe_toml(recipe: Recipe, head: str = HEAD) -> str:
    """The recipe as TOML that `read_recipe` turns into an equal one; `head` is its first comment."""
    chosen = _chosen(recipe)
    lines = [*head.splitlines(), f"version = {recipe.version}"]
    lines += [
        f"{key} = {toml_value(value)}" for key, value in chosen.items() if key not in (*SECTIONS, "tuners")
    ]
    for section in SECTIONS:
        if inside := _chosen(getattr(recipe, section)):
            lines += ["", f"[{section}]", *_pairs(inside)]
    for spec in recipe.tuners if "tuners" in chosen else ():
        lines += ["", "[[tuners]]", f"kind = {toml_value(spec.kind)}"]
        lines += _pairs({key: value for key, value in _chosen(spec).items() if key != "kind"})
    return "\n".join(lines) + "\n"


def _chosen(noun: Noun) -> dict[str, Any]:
    """The values that are not the defaults."""
    fields = type(noun).model_fields
    return {
        key: value for key, value in noun.model_dump().items() if getattr(noun, key) != fields[key].default
    }


def _pairs(values: Mapping[str, Any]) -> Iterator[str]:
    return (f"{key} = {toml_value(value)}" for key, value in values.items())


def toml_value(value: Any) -> str:
    """One value on one line: TOML 1.0, https://toml.io/en/v1.0.0."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):  # JSON's escapes are TOML's, and JSON leaves one control character as it is
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007F")
    if isinstance(value, Mapping):
        items = cast(Mapping[str, Any], value).items()
        return "{" + ", ".join(f"{toml_value(key)} = {toml_value(inner)}" for key, inner in items) + "}"
    if isinstance(value, tuple | list):
        return "[" + ", ".join(map(toml_value, cast(tuple[Any, ...], value))) + "]"
    return repr(value)
