"""`python -m recipes.starter STAGE [STAGE ...]`, or `all`: see STAGES for their names and order."""

from __future__ import annotations

import sys
from importlib import import_module

from recipes.starter.recipe import StarterRecipe

STAGES = {
    "vae": "recipes.starter.vae:train",
    "polish": "recipes.starter.vae:polish",
    "base": "recipes.starter.base:train",
    "judge": "recipes.starter.judge:train",
    "brand": "recipes.starter.brand:write",
    "pack": "recipes.starter.pack:write",
    "measure": "recipes.starter.measure:write",
}
UNPACK = {"unpack": "recipes.starter.unpack:write"}  # instead of `vae`: go on from the weights that ship


def main(names: list[str]) -> None:
    unknown = [name for name in names if name not in {*STAGES, *UNPACK, "all"}]
    if unknown or not names:
        raise SystemExit(f"name stages to run, in order: {', '.join([*UNPACK, *STAGES])}, or all")
    recipe = StarterRecipe.read()
    for name in STAGES if "all" in names else names:
        module, function = {**UNPACK, **STAGES}[name].split(":")
        getattr(import_module(module), function)(recipe)


if __name__ == "__main__":
    main(sys.argv[1:])
