"""The sample brand that ships: OpenMoji, which the base has never seen.

Writes `src/livery/starter/openmoji/`: 40 pictures to learn from and 20 for validation as an
imagefolder in `photos/`, 100 further drawings as the truth to compare with, the suite, and the attribution.
"""

from __future__ import annotations

import json
import random
import shutil

from PIL import Image

from recipes.starter.emoji import PACKAGES, Concept, concepts, fetch, icon_names, render, square_svg
from recipes.starter.recipe import HERE, StarterRecipe
from recipes.starter.scenes import article

STARTER = HERE.parents[1] / "src" / "livery" / "starter"
SIDE = 192
COUNTS = {"train": 40, "validation": 20, "truth": 100}
PLACES = {"train": "photos/train", "validation": "photos/validation", "truth": "truth"}
QUESTIONS, TUNING = 60, 20
ATTRIBUTION = "OpenMoji, the open-source emoji and icon project, openmoji.org"
LICENCE = "CC-BY-SA-4.0"
STYLE_PROMPTS = [
    "{prompt}, openmoji style",
    "{prompt} in openmoji style",
    "{prompt}, black outline",
    "{prompt}, thick black outlines, flat colours",
    "{prompt}, line art",
    "{prompt}, line icon with flat fills",
    "{prompt}, outlined icon",
    "{prompt}, cartoon style, bold outlines",
    "{prompt}, flat design",
    "{prompt}, simple flat icon, black lines",
    "{prompt}, minimal vector drawing",
    "{prompt}, sticker with a black border",
    "{prompt}, colouring book style",
    "{prompt}, noto style",
    "{prompt}, twemoji style",
    "{prompt}, fluent flat style",
    "{prompt}, noto style, black outline",
    "{prompt}, twemoji style, thick black outlines",
    "{prompt}, fluent flat style, black lines",
    "{prompt}, emoji",
]


def choose(recipe: StarterRecipe) -> dict[str, list[Concept]]:
    """Concepts per split, drawn at random, none in two splits."""
    rng = random.Random(recipe.data.seed)
    known = concepts(recipe)
    rng.shuffle(known)
    parts: dict[str, list[Concept]] = {}
    for split, count in COUNTS.items():
        parts[split], known = known[:count], known[count:]
    return parts


def write(recipe: StarterRecipe) -> None:
    folder = STARTER / "openmoji"
    shutil.rmtree(folder, ignore_errors=True)
    icons = json.loads((fetch(recipe.build, PACKAGES["openmoji"]) / "icons.json").read_text())
    names = icon_names(recipe.build, "openmoji")
    parts = choose(recipe)
    rows: list[dict[str, str]] = []
    for split, chosen in parts.items():
        for concept in chosen:
            file = folder / PLACES[split] / f"{slug(concept.label)}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            svg = square_svg(icons, icons["icons"][names[concept.hexcode]])
            Image.fromarray(render(svg, SIDE)).save(file, optimize=True)
            if split != "truth":
                rows.append(row(split, concept))
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (folder / "photos" / "metadata.jsonl").write_text(lines)
    (folder / "suite.toml").write_text(suite(recipe, parts))
    (folder / "ATTRIBUTION.md").write_text(attribution())


def row(split: str, concept: Concept) -> dict[str, str]:
    return {
        "file_name": f"{split}/{slug(concept.label)}.png",
        "text": article(concept.label),
        "concept": concept.label,
        "licence": LICENCE,
        "attribution": ATTRIBUTION,
    }


def slug(label: str) -> str:
    plain = label.lower().encode("ascii", "ignore").decode()
    return "".join(c if c.isalnum() else "-" for c in plain)


def suite(recipe: StarterRecipe, parts: dict[str, list[Concept]]) -> str:
    """The suite as TOML; pictures are named by file, relative to the folder."""
    truth = parts["truth"]
    references = sorted(f"photos/validation/{slug(c.label)}.png" for c in parts["validation"])
    lines = [
        "# Made by `python -m recipes.starter brand`.",
        'name = "openmoji"',
        'style = "openmoji"',
        f"styles = {json.dumps(recipe.data.judge_styles)}",
        "seeds = [0, 1]",
        f"style_prompts = {json.dumps(STYLE_PROMPTS, indent=2)}",
        f"concepts = {json.dumps([c.label for c in concepts(recipe)], ensure_ascii=False)}",
        f"references = {json.dumps(references)}",
    ]
    for table, chosen in (
        ("questions", truth[:QUESTIONS]),
        ("tuning", truth[QUESTIONS : QUESTIONS + TUNING]),
    ):
        for concept in chosen:
            lines += [
                "",
                f"[[{table}]]",
                f"prompt = {json.dumps(article(concept.label), ensure_ascii=False)}",
                f"concept = {json.dumps(concept.label, ensure_ascii=False)}",
                f'reference = "truth/{slug(concept.label)}.png"',
            ]
    return "\n".join(lines) + "\n"


def attribution() -> str:
    return (
        "# Attribution\n\n"
        f"All pictures in this folder are emojis designed by {ATTRIBUTION}. "
        "Licence: CC BY-SA 4.0, https://creativecommons.org/licenses/by-sa/4.0/. "
        f"Changes: rendered from SVG (npm package `{PACKAGES['openmoji']}`) to {SIDE} x {SIDE} PNG.\n"
        "Pictures that you derive from them, and adapters trained on them that you share, "
        "should carry the same notice.\n"
    )
