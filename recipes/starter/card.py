"""The starter's model card, written from what was measured."""

from __future__ import annotations

import json
from typing import Any

from recipes.starter.brand import STARTER
from recipes.starter.emoji import LABELS, PACKAGES
from recipes.starter.recipe import StarterRecipe

LICENCES = {
    "noto": ("Noto Emoji, Google", "Apache-2.0"),
    "twemoji": ("Twemoji, Twitter and contributors", "CC-BY-4.0"),
    "fluent flat": ("Fluent Emoji (flat), Microsoft", "MIT"),
    "fluent 3d": ("Fluent Emoji (3D gradients), Microsoft", "MIT"),
    "openmoji": ("OpenMoji, HfG Schwäbisch Gmünd and contributors", "CC-BY-SA-4.0"),
}
HISTORY = """
These first weights were trained while the recipe was still being found: the autoencoder's KL weight, the loss
and the end of the noise schedule, and the judge's pictures changed on the way. The recipe as it stands makes
a model of the same kind, not these very bytes."""
BARS = {"vae": 24.0, "style": 0.90, "concept": 0.50, "judge_concept": 0.80, "judge_style": 0.95}


def write(recipe: StarterRecipe) -> None:
    measured = json.loads((STARTER / "measured.json").read_text())
    (STARTER / "README.md").write_text(text(recipe, measured))


def text(recipe: StarterRecipe, measured: dict[str, Any]) -> str:
    judge, asked, drawing = measured["judge"], measured["asked"], measured["drawing"]
    return f"""# The starter: livery's built-in model

A small latent diffusion model of Stable Diffusion's own classes (AutoencoderKL, UNet2DConditionModel,
CLIPTextModel, CLIPTokenizer, a DDPM schedule with v-prediction), and a separate small CLIPModel that judges.
It exists so that livery runs, and is tested, on a laptop with the network cut. It draws {recipe.data.size} x
{recipe.data.size} pictures of {measured["concepts"]} everyday things (animals and nature, food and drink,
activities) in three styles. It is no model to ship products with.

![Sixty pictures, evenly taken from those that were measured](../../../docs/images/starter-contact-sheet.png)

Prompts it understands: "a red apple, noto style", "two tulips on a blue background", "a cat left of a
pizza, twemoji style", "a lion, fluent flat style".

## How well it draws

Measured by `python -m recipes.starter measure`, on {asked["concepts"]} concepts x {
        asked["styles"]
    } styles, one
fixed seed each ({drawing["sampler"]}, {drawing["steps"]} steps, guidance {
        drawing["guidance"]:g}); the figures
are over its {measured["concepts"]} concepts.

| what | measured | wanted |
|---|---|---|
| autoencoder on OpenMoji, which it never saw | {measured["vae_psnr_openmoji_db"]:.1f} dB | {
        BARS["vae"]:.0f} dB |
| the judge names the asked style | {measured["style"]:.0%} | {BARS["style"]:.0%} |
| the asked concept is among the judge's first five | {measured["concept_top5"]:.0%} | {BARS["concept"]:.0%} |
| the asked concept is the judge's first | {measured["concept_top1"]:.0%} | |
| judge, held-out drawings ({judge["held_out"]:.0f}): concept among its first five | {
        judge["concept_top5"]:.0%} | {BARS["judge_concept"]:.0%} |
| judge, held-out drawings: style | {judge["style"]:.0%} | {BARS["judge_style"]:.0%} |

{shortfall(measured)}

Training, on two CPU cores that were shared with other work: {times(measured)}.
{HISTORY}

## What it learned from

{sources(recipe)}

Names, tags and synonyms: `{LABELS}` (MIT). The autoencoder, the text encoder and the UNet saw the first three
sets only. **OpenMoji was held out from them**: it is the sample brand. The judge saw all five,
less {recipe.judge.held_out:.0%} of the concept-style pairs.

The sets' licences ask for attribution: keep this page with the weights. The judge's weights were
trained on OpenMoji too (CC BY-SA 4.0); adapters trained on the sample brand should name OpenMoji and carry
its licence.

## Limits

Small pictures, a few hundred things, no people, no text, no photographs. Rare things and long prompts come
out wrong; counts over four and positions other than beside and above are unknown to it. The judge is as
narrow: its answers mean nothing outside drawings of these things.
"""


def shortfall(measured: dict[str, Any]) -> str:
    judge = measured["judge"]
    found = {
        "the autoencoder": measured["vae_psnr_openmoji_db"] >= BARS["vae"],
        "the style": measured["style"] >= BARS["style"],
        "the concept": measured["concept_top5"] >= BARS["concept"],
        "the judge's concepts": judge["concept_top5"] >= BARS["judge_concept"],
        "the judge's styles": judge["style"] >= BARS["judge_style"],
    }
    short = [name for name, reached in found.items() if not reached]
    if not short:
        return "Every figure reaches what was wanted."
    return f"**Below what was wanted: {', '.join(short)}.** More training is what they lack first."


def times(measured: dict[str, Any]) -> str:
    return ", ".join(
        f"{stage} {facts['steps']:,} steps in {facts['seconds'] / 60:.0f} minutes"
        for stage, facts in measured["training"].items()
    )


def sources(recipe: StarterRecipe) -> str:
    lines = ["| style | set | licence | package |", "|---|---|---|---|"]
    for style in recipe.data.judge_styles:
        name, licence = LICENCES[style]
        lines.append(f"| {style} | {name} | {licence} | `{PACKAGES[style]}` |")
    return "\n".join(lines)
