"""Puts the packed weights back into `build/`: a fresh clone trains the shipped starter further."""

from __future__ import annotations

import shutil

from recipes.starter.brand import STARTER
from recipes.starter.recipe import StarterRecipe


def write(recipe: StarterRecipe) -> None:
    """What is in `build/` already is newer and stays."""
    parts = {
        "base/vae": "vae",
        "base/tokenizer": "tokenizer",
        "base/unet": "model/unet",
        "base/text_encoder": "model/text_encoder",
        "judge": "judge",
    }
    for packed, place in parts.items():
        if not (recipe.build / place).exists():
            shutil.copytree(STARTER / packed, recipe.build / place)
