"""docs/recipes.md: every key of a recipe, written from the nouns themselves. `make docs` writes it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, cast

from livery.nouns.base import Noun
from livery.nouns.recipe import SECTIONS, VERSION, Recipe
from livery.nouns.recipe_file import toml_value
from livery.nouns.tuning import SORTS, PluginSpec

HEAD = f"""# Recipes

A recipe is a TOML file; `livery train recipe.toml --data ID` runs it. Every key has a default, so a recipe
holds only what it wants otherwise. It is checked before any weight is read: an unknown key, or one in the
wrong table, is refused with the nearest known one named, and so are keys that contradict each other. What is
allowed but seldom meant is said as a warning. The whole recipe is stored in the adapter, and written beside
the run's checkpoints as `recipe.toml`.

```toml
version = {VERSION}
base = "path/to/stable-diffusion-v1-5"
trigger = "acme style"
steps_per_photo = 50                   # between min_steps and max_steps
learning_rate = 1e-4

[optimizer]
schedule = "constant"

[[tuners]]
kind = "lora"
rank = 16
towers = {{text_encoder = 2e-5}}
```

`livery presets` lists recipes that experienced users converge on, one per family and method, and
`livery train --preset sdxl-lora --data ID` runs one; `livery import-recipe FILE` turns a configuration of
kohya's trainers into a recipe.

**From kohya's trainers.** `livery import-recipe config.toml -o recipe.toml` reads sd-scripts' TOML or the
JSON that the kohya_ss GUI saves, and prints what became of every key: taken, changed (and into what, and
why) or dropped. The recipe trains as kohya would: the same layers, kohya's defaults where the file is
silent (rank 4, alpha 1, constant schedule, no caption dropout, text encoders that learn), and alpha kept,
so that learning rates mean what they meant; the table tells what each rate would be at alpha = rank.
`--alpha-as-rank` writes it so. `--family sdxl` says what the base is where the file does not. Repeats that
stand in folder names are read where the folders are at hand; else the table says to multiply by them.

**Versions.** `version` says which keys a recipe was written for. Older recipes, also those inside adapters,
are brought to today's keys by themselves; a recipe from a newer livery is refused. A recipe without
`version` counts as version {VERSION}, or as version 1 when it has keys that only version 1 had at the top
(`resolution`, `warmup_steps`, `min_snr_gamma` and so on).

This page is written from the code by `make docs`; a test compares them.
"""
TUNERS_HEAD = """## `[[tuners]]`

What changes. Several tables are several tuners in one run: `tokens` with `lora` is pivotal tuning. A kind
has the keys of its sort.
"""


def recipe_page() -> str:
    """The page as it should be."""
    top = [key for key in Recipe.model_fields if key not in SECTIONS]
    parts = [HEAD, "## At the top\n", _table(Recipe, top)]
    for name, spec in SECTIONS.items():
        parts += [f"## `[{name}]`\n", f"{_summary(spec)}\n", _table(spec, list(spec.model_fields))]
    parts += [TUNERS_HEAD]
    for spec in (*SORTS, PluginSpec):
        kinds = _takes(spec.model_json_schema()["properties"]["kind"])
        title = "a plug-in's kind" if spec is PluginSpec else f"kind {kinds}"
        parts += [f"### {title}\n", f"{_summary(spec)}\n", _table(spec, list(spec.model_fields))]
    return "\n".join(parts)


def _summary(spec: type[Noun]) -> str:
    return " ".join((spec.__doc__ or "").split())


def _table(spec: type[Noun], keys: list[str]) -> str:
    schema = spec.model_json_schema()["properties"]
    rows = ["| key | takes | default | meaning |", "|---|---|---|---|"]
    for key in keys:
        field = spec.model_fields[key]
        default = "" if field.is_required() else _default(field.default)
        meaning = (field.description or "").replace("<", "&lt;").replace("|", "&#124;")
        rows.append(f"| `{key}` | {_takes(schema[key])} | {default} | {meaning} |")
    return "\n".join(rows) + "\n"


def _default(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, tuple) and any(isinstance(each, Noun) for each in cast(tuple[Any, ...], value)):
        return "one LoRA of rank 16"
    return f"`{toml_value(value)}`"


def _takes(schema: Mapping[str, Any]) -> str:
    """What a key takes, in words, from its JSON schema."""
    if "enum" in schema:
        return ", ".join(f"`{toml_value(value)}`" for value in schema["enum"])
    if "const" in schema:
        return f"`{toml_value(schema['const'])}`"
    if "anyOf" in schema:
        kinds = [each for each in schema["anyOf"] if each.get("type") != "null"]
        return " or ".join(_takes(each) for each in kinds)
    match schema.get("type"):
        case "array":
            inner = schema.get("prefixItems") or [schema.get("items", {})]
            count = f"{len(inner)} " if "prefixItems" in schema else ""
            return "tables" if "oneOf" in inner[0] else f"list of {count}{_plural(_takes(inner[0]))}"
        case "object":
            return f"table of name = {_takes(schema['additionalProperties'])}"
        case "integer" | "number":
            return " ".join(["whole number" if schema["type"] == "integer" else "number", *_bounds(schema)])
        case "boolean":
            return "`true` or `false`"
        case _:
            return "text"


def _bounds(schema: Mapping[str, Any]) -> Iterator[str]:
    low, above = schema.get("minimum"), schema.get("exclusiveMinimum")
    high, below = schema.get("maximum"), schema.get("exclusiveMaximum")
    lower = f"from {low:g}" if low is not None else f"above {above:g}" if above is not None else ""
    upper = f"to {high:g}" if high is not None else f"below {below:g}" if below is not None else ""
    yield from filter(None, (lower, upper))


def _plural(words: str) -> str:
    return words.replace("number", "numbers").replace("text", "texts")
