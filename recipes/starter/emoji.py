"""Five design houses' drawings of the same concepts, from their npm packages, each rendered once."""

from __future__ import annotations

import io
import json
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from recipes.starter.recipe import StarterRecipe

PACKAGES = {
    "noto": "@iconify-json/noto@1.2.9",
    "twemoji": "@iconify-json/twemoji@1.2.5",
    "fluent flat": "@iconify-json/fluent-emoji-flat@1.2.6",
    "fluent 3d": "@iconify-json/fluent-emoji@1.2.7",
    "openmoji": "@iconify-json/openmoji@1.2.29",
}
LABELS = "emojibase-data@17.0.0"


@dataclass(frozen=True)
class Concept:
    label: str
    tags: list[str]
    group: int
    hexcode: str


def fetch(build: Path, package: str) -> Path:
    """Unpack one npm package (through the npm client) and return its folder."""
    folder = build / "packages" / package.replace("/", "_").lstrip("@")
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        done = subprocess.run(
            ["npm", "pack", "--silent", package],
            cwd=folder.parent,
            check=True,
            capture_output=True,
            text=True,
        )
        unpacked = folder.with_suffix(".part")
        with tarfile.open(folder.parent / done.stdout.split()[-1]) as archive:
            archive.extractall(unpacked, filter="data")
        unpacked.rename(folder)
    return folder / "package"


def plain(hexcode: str) -> str:
    """A code point sequence without variation selectors, lower case: `2764-FE0F` -> `2764`."""
    return "-".join(part for part in hexcode.lower().split("-") if part != "fe0f")


def concepts(recipe: StarterRecipe, groups: list[int] | None = None) -> list[Concept]:
    """The concepts of some groups (by default the base's) that every set draws, in emojibase order."""
    groups = recipe.data.groups if groups is None else groups
    data = json.loads((fetch(recipe.build, LABELS) / "en" / "data.json").read_text())
    names = {style: icon_names(recipe.build, style) for style in PACKAGES}
    found = [
        Concept(e["label"], e.get("tags", []), e["group"], plain(e["hexcode"]))
        for e in data
        if e.get("group") in groups
    ]
    return [c for c in found if all(c.hexcode in names[style] for style in PACKAGES)]


def icon_names(build: Path, style: str) -> dict[str, str]:
    """Code points -> icon name. Fluent's 3D set has no table of its own but the flat set's names."""
    table = PACKAGES["fluent flat" if style == "fluent 3d" else style]
    chars = json.loads((fetch(build, table) / "chars.json").read_text())
    icons = json.loads((fetch(build, PACKAGES[style]) / "icons.json").read_text())["icons"]
    return {plain(code): name for code, name in chars.items() if name in icons}


def square_svg(icons: dict[str, Any], icon: dict[str, Any]) -> str:
    """One icon of an iconify set as SVG text, centred in a square view."""
    width = icon.get("width", icons.get("width", 16))
    height = icon.get("height", icons.get("height", 16))
    side = max(width, height)
    left = icon.get("left", 0) - (side - width) / 2
    top = icon.get("top", 0) - (side - height) / 2
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{left} {top} {side} {side}">{icon["body"]}</svg>'
    )


def render(svg: str, size: int) -> np.ndarray:
    """SVG text -> uint8 [size, size, 4], straight alpha."""
    import resvg_py

    png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size))
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGBA"))


def drawings(recipe: StarterRecipe, style: str, groups: list[int] | None = None) -> Tensor:
    """uint8 [concepts, 4, render, render] in the order of `concepts`; rendered on first use."""
    groups = recipe.data.groups if groups is None else groups
    name = "-".join([*style.split(), *map(str, groups)])
    path = recipe.build / f"{name}.safetensors"
    if not path.exists():
        icons = json.loads((fetch(recipe.build, PACKAGES[style]) / "icons.json").read_text())
        names = icon_names(recipe.build, style)
        side, pictures = recipe.data.render, []
        for concept in concepts(recipe, groups):
            icon = icons["icons"][names[concept.hexcode]]
            pictures.append(torch.from_numpy(render(square_svg(icons, icon), side).copy()))
        save_file({"rgba": torch.stack(pictures).permute(0, 3, 1, 2).contiguous()}, path)
    return load_file(path)["rgba"]
