"""Copies the trained weights, in half precision, to where the package ships them."""

from __future__ import annotations

import json
import shutil

from recipes.starter import vae
from recipes.starter.brand import STARTER
from recipes.starter.recipe import StarterRecipe

LIMIT = 45_000_000  # bytes of safetensors in all: the package must stay light


def write(recipe: StarterRecipe) -> None:
    for name, part in {"base": "model", "judge": "judge"}.items():
        shutil.rmtree(STARTER / name, ignore_errors=True)
        shutil.copytree(recipe.build / part, STARTER / name)
    vae.load(recipe.build / "vae").half().save_pretrained(STARTER / "base" / "vae")
    for config in STARTER.rglob("config.json"):
        values = json.loads(config.read_text())
        values.pop("_name_or_path", None)  # where it was built is nobody's business
        config.write_text(json.dumps(values, indent=2) + "\n")
    size = sum(file.stat().st_size for file in STARTER.rglob("*.safetensors"))
    print(f"starter weights: {size / 1e6:.1f} MB")
    if size > LIMIT:
        raise SystemExit(f"the weights are {size} bytes, over the limit of {LIMIT}: make the parts smaller")
