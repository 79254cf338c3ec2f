"""Measures the packed starter on fixed seeds, draws its contact sheet, writes its model card."""

from __future__ import annotations

import json
import random

import torch
from PIL import Image

from livery.evaluate.embedder import ClipEmbedder, load_embedder
from livery.generate.engine import GUIDANCE, STEPS, Engine
from livery.models.load import load_backbone
from recipes.starter import card, fit, vae
from recipes.starter.brand import STARTER
from recipes.starter.emoji import concepts
from recipes.starter.recipe import HERE, StarterRecipe
from recipes.starter.scenes import article

ASKED = 200
SHEET = (10, 6)  # columns, rows
PICTURE = HERE.parents[1] / "docs" / "images" / "starter-contact-sheet.png"


def write(recipe: StarterRecipe) -> None:
    labels = [concept.label for concept in concepts(recipe)]
    judge = load_embedder("starter")
    engine = Engine(load_backbone("starter", device=str(fit.device())))
    asked = sorted(random.Random(recipe.data.seed).sample(range(len(labels)), min(ASKED, len(labels))))
    rows = [(number, style) for number in asked for style in recipe.data.base_styles]
    pictures = list(
        engine.generate(
            [f"{article(labels[number])}, {style} style" for number, style in rows],
            [number for number, _ in rows],
        )
    )
    found = recognised(judge, pictures, rows, labels, recipe.data.judge_styles)
    truth = vae.unseen(recipe)
    with torch.no_grad():
        backbone = engine.backbone
        made = torch.cat(
            [
                backbone.decode_latents(backbone.encode_images(p.to(backbone.device))).cpu()
                for p in truth.split(32)
            ]
        )
    results = {
        "concepts": len(labels),
        "vae_psnr_openmoji_db": round(float(vae.psnr(made.clamp(-1, 1), truth).mean()), 2),
        "asked": {"concepts": len(asked), "styles": len(recipe.data.base_styles), "pictures": len(rows)},
        **found,
        "judge": judge.card.reliability,
        "drawing": {"sampler": "dpm++", "steps": STEPS, "guidance": GUIDANCE},
        "training": training(recipe),
    }
    sheet(pictures).save(PICTURE, optimize=True)
    (STARTER / "measured.json").write_text(json.dumps(results, indent=2) + "\n")
    card.write(recipe)
    print(json.dumps(results, indent=2))


def recognised(
    judge: ClipEmbedder,
    pictures: list[Image.Image],
    rows: list[tuple[int, str]],
    labels: list[str],
    styles: list[str],
) -> dict[str, float]:
    """Shares of pictures in which the judge finds the asked style, and the concept among its best."""
    images = judge.embed_images(pictures)
    names = judge.embed_texts(judge.card.concept_texts(labels))
    looks = judge.embed_texts(judge.card.style_texts(styles))
    best = (images @ names.T).topk(5, dim=1).indices.tolist()
    guess = (images @ looks.T).argmax(1).tolist()
    count = len(rows)
    hits = {
        "concept_top1": sum(b[0] == n for b, (n, _) in zip(best, rows, strict=True)),
        "concept_top5": sum(n in b for b, (n, _) in zip(best, rows, strict=True)),
        "style": sum(styles[g] == s for g, (_, s) in zip(guess, rows, strict=True)),
    }
    return {name: round(value / count, 4) for name, value in hits.items()}


def sheet(pictures: list[Image.Image]) -> Image.Image:
    """A contact sheet of evenly chosen pictures, every style equally often."""
    columns, lines = SHEET
    chosen = [pictures[n * (len(pictures) - 1) // (columns * lines - 1)] for n in range(columns * lines)]
    side = chosen[0].width
    canvas = Image.new("RGB", (columns * side, lines * side), "white")
    for number, picture in enumerate(chosen):
        canvas.paste(picture, (number % columns * side, number // columns * side))
    return canvas


def training(recipe: StarterRecipe) -> dict[str, dict[str, float]]:
    """Steps and seconds of every stage, from its checkpoint."""
    from safetensors import safe_open

    told: dict[str, dict[str, float]] = {}
    for stage in ("vae", "decoder", "base", "judge"):
        path = recipe.build / f"{stage}.fit.safetensors"
        if path.exists():
            with safe_open(path, "pt") as file:
                facts = file.metadata()
            told[stage] = {"steps": int(facts["step"]), "seconds": round(float(facts["seconds"]))}
    return told
