"""The starter's judge: a small CLIPModel with its own towers, never the generator's text encoder.

It learns all five sets, less a share of concept-style pairs that are kept to measure it.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from recipes.starter import fit
from recipes.starter.base import tokenizer
from recipes.starter.emoji import Concept, concepts, drawings
from recipes.starter.recipe import StarterRecipe
from recipes.starter.scenes import BACKGROUNDS, Scene, article, paint

TEXT_LENGTH = 32
STYLE_TEMPLATE = "{style} style"
TEMPERATURE = 20.0


@dataclass(frozen=True)
class Pair:
    concept: int
    style: int


def known(recipe: StarterRecipe) -> list[Concept]:
    """Every concept that the judge learns; the base knows a part of them."""
    return concepts(recipe, recipe.judge.groups)


def asked(recipe: StarterRecipe) -> list[int]:
    """The places, among those that the judge knows, of the concepts that the base knows."""
    return [n for n, concept in enumerate(known(recipe)) if concept.group in recipe.data.groups]


def pairs(recipe: StarterRecipe) -> tuple[list[Pair], list[Pair]]:
    """Concept-style pairs: (to learn from, held out). Every concept is seen in at least three sets."""
    rng = random.Random(recipe.judge.seed)
    learn, held = [], []
    core = asked(recipe)
    for concept in [*core, *sorted(set(range(len(known(recipe)))) - set(core))]:
        styles = list(range(len(recipe.data.judge_styles)))
        out = [style for style in styles if rng.random() < recipe.judge.held_out][:2]
        held += [Pair(concept, style) for style in out]
        learn += [Pair(concept, style) for style in styles if style not in out]
    return learn, held


def build(recipe: StarterRecipe, words: CLIPTokenizer) -> CLIPModel:
    torch.manual_seed(recipe.judge.seed)
    settings = recipe.judge
    special = {
        "bos_token_id": words.bos_token_id,
        "eos_token_id": words.eos_token_id,
        "pad_token_id": words.eos_token_id,
    }
    text = {
        "vocab_size": len(words),
        "hidden_size": settings.text_width,
        "intermediate_size": 4 * settings.text_width,
        "num_hidden_layers": settings.text_layers,
        "num_attention_heads": 4,
        "max_position_embeddings": TEXT_LENGTH,
        "projection_dim": settings.text_width,
        **special,
    }
    vision = {
        "hidden_size": settings.width,
        "intermediate_size": 4 * settings.width,
        "num_hidden_layers": settings.layers,
        "num_attention_heads": 4,
        "image_size": recipe.data.size,
        "patch_size": settings.patch,
        "attention_dropout": 0.0,
        "projection_dim": settings.text_width,
    }
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=settings.text_width)
    model = CLIPModel(config)
    model.set_attn_implementation("eager")  # faster than fused at this size on a CPU
    return model


def views(drawn: Tensor, colours: Tensor, shape: Tensor, draw: torch.Generator) -> Tensor:
    """Premultiplied drawings [B, 4, S, S] in [0, 1] on colours [B, 3] -> training views [B, 3, S, S].

    A few thousand drawings are soon known by heart, so each is seen as something else every time. Rows where
    `shape` [B] is true are to be named by what they show: bent, recoloured, faded to grey. The others are to
    be named by how they are drawn: zoomed and turned far, colours and lines nearly as they are.
    """

    def between(low: float, high: float, *size: int) -> Tensor:
        return low + (high - low) * torch.rand((len(drawn), *size), generator=draw)

    near = torch.where(shape | (between(0, 1) < 0.4), between(-0.35, 0.35), between(-1.0, 0.2)).exp()
    turn = torch.where(shape, between(-0.45, 0.45), between(-1.6, 1.6) * (between(0, 1) < 0.5))
    mirror = torch.where(between(0, 1) < 0.5, -1.0, 1.0)
    stretch, shear = between(-0.25, 0.25).exp(), between(-0.2, 0.2) * shape
    move = torch.where(shape, 0.2, (1.1 - near).clamp(0.1, 0.6))
    cos, sin = near / 0.95 * turn.cos(), near / 0.95 * turn.sin()
    rows = [cos * mirror * stretch, shear - sin, move * between(-1, 1)]
    rows += [sin * mirror * stretch, cos, move * between(-1, 1)]
    grid = functional.affine_grid(
        torch.stack(rows, 1).reshape(-1, 2, 3), list(drawn.shape), align_corners=False
    )
    bend = functional.interpolate(
        between(-1, 1, 2, 5, 5), drawn.shape[-2:], mode="bicubic", align_corners=True
    )
    grid = grid + 0.09 * bend.permute(0, 2, 3, 1) * (shape & (between(0, 1) < 0.7))[:, None, None, None]
    placed = functional.grid_sample(drawn, grid, align_corners=False)
    pixels = placed[:, :3] + colours[:, :, None, None] * (1 - placed[:, 3:])

    small = functional.avg_pool2d(pixels, 2)
    soft = functional.interpolate(small, size=pixels.shape[-2:], mode="bilinear", align_corners=False)
    amount = between(0, 1) * (between(0, 1) < torch.where(shape, 0.5, 0.25))
    pixels = pixels.lerp(soft, amount[:, None, None, None])

    # A colour matrix per row: near the identity for the way of drawing, anything that mixes hues for shapes.
    wild = (shape & (between(0, 1) < 0.6)).float()[:, None, None]
    mixed = functional.normalize(between(0, 1, 3, 3).square(), p=1, dim=2)
    grey = torch.full_like(mixed, 1 / 3)
    mixed = torch.where((between(0, 1) < 0.3)[:, None, None], grey, mixed)
    gain = torch.diag_embed(1 + (0.03 + 0.2 * shape.float()[:, None]) * between(-1, 1, 3))
    matrix = gain @ (torch.eye(3) + wild * between(0.3, 1, 1, 1) * (mixed - torch.eye(3)))
    return torch.einsum("bij,bjhw->bihw", matrix, pixels).clamp(0, 1)


def premultiplied(recipe: StarterRecipe) -> Tensor:
    """Every drawing of the judge's styles, uint8 [styles, concepts, 4, S, S], alpha multiplied in."""
    sets = []
    for style in recipe.data.judge_styles:
        rgba = drawings(recipe, style, recipe.judge.groups).float() / 255
        rgba = torch.cat([rgba[:, :3] * rgba[:, 3:], rgba[:, 3:]], 1)
        side = recipe.data.size
        small = functional.interpolate(
            rgba, (side, side), mode="bilinear", antialias=True, align_corners=False
        )
        sets.append((small.clamp(0, 1) * 255).round().to(torch.uint8))
    return torch.stack(sets)


class Texts:
    """The fixed label texts, tokenized once."""

    def __init__(self, recipe: StarterRecipe, words: CLIPTokenizer) -> None:
        self.words = words
        self.concepts = self.ids([article(c.label) for c in known(recipe)])
        self.styles = self.ids([STYLE_TEMPLATE.format(style=s) for s in recipe.data.judge_styles])

    def ids(self, texts: list[str]) -> Tensor:
        done = self.words(texts, padding="max_length", max_length=16, truncation=True, return_tensors="pt")
        return done.input_ids.to(fit.device())


def text_features(model: CLIPModel, ids: Tensor) -> Tensor:
    """Unit-length [N, D]."""
    pooled = model.text_model(ids).pooler_output
    return functional.normalize(model.text_projection(pooled).float(), dim=-1)


def image_features(model: CLIPModel, pixels: Tensor, keep: Tensor | None = None) -> Tensor:
    """pixels [B, 3, S, S] in [0, 1] -> unit-length [B, D]; `keep` [B, K]: the patches that are looked at.

    Hiding patches while training is faster and a strong regulariser: Li et al. 2023, arXiv:2212.00794.
    """
    tower = model.vision_model
    tokens = tower.embeddings(pixels * 2 - 1)
    if keep is not None:
        rows = torch.arange(len(tokens), device=tokens.device)[:, None]
        tokens = torch.cat([tokens[:, :1], tokens[rows, 1 + keep]], 1)
    states = tower.encoder(inputs_embeds=tower.pre_layrnorm(tokens)).last_hidden_state
    pooled = tower.post_layernorm(states[:, 0])
    return functional.normalize(model.visual_projection(pooled).float(), dim=-1)


def train(recipe: StarterRecipe) -> None:
    words = tokenizer(recipe, [])
    model, texts = build(recipe, words), Texts(recipe, words)
    learn, held = pairs(recipe)
    drawn, palette = premultiplied(recipe), list(BACKGROUNDS)
    settings, core = recipe.judge, set(asked(recipe))
    focus = [p for p in learn if p.concept in core]
    job = fit.Fit(
        "judge",
        model,
        recipe.build,
        steps=settings.steps,
        peak=settings.learning_rate,
        warmup=200,
        ema=0.998,
        weight_decay=settings.weight_decay,
    )
    labels = [article(c.label) for c in known(recipe)]
    known_in: dict[int, list[int]] = {}
    for one in learn:
        known_in.setdefault(one.concept, []).append(one.style)

    def loss_of(step: int) -> Tensor:
        rng = random.Random(settings.seed * 1_000_003 + step)
        chosen = [
            rng.choice(focus if rng.random() < settings.focus else learn) for _ in range(settings.batch)
        ]
        grounds = ["white" if rng.random() < 0.6 else rng.choice(palette) for _ in chosen]
        captions = [
            f"{labels[p.concept]} on {article(ground)} background, "
            + STYLE_TEMPLATE.format(style=recipe.data.judge_styles[p.style])
            for p, ground in zip(chosen, grounds, strict=True)
        ]
        draw = fit.generator(settings.seed, step)
        rows = drawn[[p.style for p in chosen], [p.concept for p in chosen]].float() / 255
        shape = torch.rand(len(chosen), generator=draw) < settings.shapes
        # Half of the shapes are faded into another house's drawing of the same thing.
        others = [rng.choice(known_in[p.concept]) for p in chosen]
        share = (
            torch.rand(len(chosen), generator=draw) * (torch.rand(len(chosen), generator=draw) < 0.5) * shape
        )
        rows = rows.lerp(drawn[others, [p.concept for p in chosen]].float() / 255, share[:, None, None, None])
        colours = torch.tensor([BACKGROUNDS[ground] for ground in grounds]) / 255
        pixels = views(rows, colours, shape, draw)
        patches = (recipe.data.size // settings.patch) ** 2
        seen = patches if step > 0.92 * settings.steps else round(settings.seen * patches)
        keep = torch.rand((len(chosen), patches), generator=draw).argsort(1)[:, :seen]
        unique, inverse = texts.ids(captions).unique(dim=0, return_inverse=True)
        rivals = [p.concept for p in chosen] + [rng.randrange(len(labels)) for _ in range(32)]
        shown, concept = torch.tensor(rivals, device=fit.device()).unique(return_inverse=True)
        with fit.autocast():
            images = image_features(model, pixels.to(fit.device()), keep.to(fit.device()))
            names = text_features(model, texts.concepts[shown])
            styles = text_features(model, texts.styles)
            full = text_features(model, unique)
        concept = concept[: len(chosen)]
        style = torch.tensor([p.style for p in chosen], device=fit.device())
        shape = shape.to(fit.device())
        looks = functional.cross_entropy(
            TEMPERATURE * images @ styles.T, style, reduction="none", label_smoothing=0.1
        )
        whole = functional.cross_entropy(TEMPERATURE * images @ full.T, inverse, reduction="none")
        return functional.cross_entropy(TEMPERATURE * images @ names.T, concept, label_smoothing=0.1) + (
            (looks + 0.25 * whole) * ~shape
        ).mean() / (1 - settings.shapes)

    for step, loss in job.run(loss_of):
        with job.averaged():
            scores = reliability(recipe, model, texts, held)
        print(f"judge {step}/{job.steps} loss {loss:.3f} {scores} {job.seconds:.0f} s", flush=True)
    model.load_state_dict(job.average)
    save(recipe, model, words, reliability(recipe, model, texts, held))


@torch.no_grad()
def reliability(recipe: StarterRecipe, model: CLIPModel, texts: Texts, held: list[Pair]) -> dict[str, float]:
    """Share of held-out renderings of the base's things, on white, whose concept and style are found."""
    model.eval()
    sets = [drawings(recipe, style, recipe.judge.groups) for style in recipe.data.judge_styles]
    core = torch.tensor(asked(recipe))
    held = [pair for pair in held if pair.concept in set(core.tolist())]
    scene = Scene("", "white", ((0, 0.5, 0.5, 0.92),))
    found, top5, style_hits = 0, 0, 0
    names = text_features(model, texts.concepts[core.to(fit.device())])
    styles = text_features(model, texts.styles)
    for start in range(0, len(held), 64):
        part = held[start : start + 64]
        pixels = [paint(sets[p.style][p.concept][None], scene, recipe.data.size) for p in part]
        images = image_features(model, torch.stack(pixels).to(fit.device()).float() / 255)
        best = core[(images @ names.T).topk(5, dim=1).indices.cpu()].tolist()
        guess = (images @ styles.T).argmax(1).tolist()
        found += sum(b[0] == p.concept for p, b in zip(part, best, strict=True))
        top5 += sum(p.concept in b for p, b in zip(part, best, strict=True))
        style_hits += sum(g == p.style for p, g in zip(part, guess, strict=True))
    model.train()
    scores = {"concept_top1": found, "concept_top5": top5, "style": style_hits}
    return {"held_out": len(held)} | {k: round(v / len(held), 4) for k, v in scores.items()}


def save(
    recipe: StarterRecipe, model: CLIPModel, words: CLIPTokenizer, reliability: dict[str, float]
) -> None:
    folder = recipe.build / "judge"
    model.half().save_pretrained(folder)
    words.save_pretrained(folder)
    side = {"height": recipe.data.size, "width": recipe.data.size}
    image = {
        "image_processor_type": "CLIPImageProcessor",
        "size": side,
        "do_center_crop": False,
        "crop_size": side,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
        "resample": 2,
    }
    write_json(folder / "preprocessor_config.json", image)
    card = {
        "name": "livery starter judge",
        "concept_template": "a {concept}",
        "style_template": STYLE_TEMPLATE,
        "reliability": reliability,
    }
    write_json(folder / "livery.json", card)


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")
