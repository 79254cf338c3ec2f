"""The starter's autoencoder: an AutoencoderKL trained on scenes of the base's three styles."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.nn import functional

from recipes.starter import fit
from recipes.starter.emoji import drawings
from recipes.starter.recipe import StarterRecipe
from recipes.starter.scenes import Scene, paint, several, single

Vae = Any
"""An AutoencoderKL; its own annotations are too narrow to check against."""


def build(recipe: StarterRecipe) -> Vae:
    torch.manual_seed(recipe.vae.seed)
    levels = len(recipe.vae.channels)
    config = {
        "in_channels": 3,
        "out_channels": 3,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "block_out_channels": recipe.vae.channels,
        "layers_per_block": 1,
        "latent_channels": recipe.vae.latent_channels,
        "norm_num_groups": 8,
        "sample_size": recipe.data.size,
    }
    return AutoencoderKL.from_config(config)


def outlined(rgba: Tensor, width: int, ink: Tensor) -> Tensor:
    """Draw a line of `width` pixels around the shape: line art is rare in flat sets, common in brands."""
    alpha = rgba[3:].float()[None] / 255
    grown = functional.max_pool2d(alpha, 2 * width + 1, 1, width)[0]
    paint_over = rgba[3:].float() / 255
    colour = rgba[:3].float() * paint_over + ink[:, None, None] * 255 * (1 - paint_over)
    return torch.cat([colour, grown * 255]).round().to(torch.uint8)


def batch(recipe: StarterRecipe, sets: dict[str, Tensor], step: int) -> Tensor:
    """Pictures in [-1, 1] [B, 3, size, size]: random scenes, turned, recoloured, some with outlines."""
    rng = random.Random(recipe.vae.seed * 1_000_003 + step)
    pictures = []
    for _ in range(recipe.vae.batch):
        style = rng.choice(recipe.data.base_styles)
        rgba = sets[style][rng.randrange(len(sets[style]))]
        if rng.random() < 0.3:
            rgba = outlined(rgba, rng.choice([1, 2, 3]), torch.full((3,), rng.random() * 0.2))
        if rng.random() < 0.5:
            rgba = rgba.flip(-1)
        if rng.random() < 0.25:
            rgba = rgba.rot90(rng.choice([1, 2, 3]), (1, 2))
        if rng.random() < 0.3:
            rgba = torch.cat([rgba[:3][torch.tensor(rng.sample([0, 1, 2], 3))], rgba[3:]])
        scene = single(rng, 0, style) if rng.random() < 0.7 else several(rng, 0, style)
        pictures.append(paint(rgba[None], scene, recipe.data.size))
    return torch.stack(pictures).float() / 127.5 - 1


def edges(a: Tensor, b: Tensor) -> Tensor:
    """L1 between the finite differences of two pictures, both ways."""
    d = a - b
    return (d[..., 1:] - d[..., :-1]).abs().mean() + (d[..., 1:, :] - d[..., :-1, :]).abs().mean()


def likeness(recipe: StarterRecipe, guess: Tensor, pixels: Tensor) -> Tensor:
    """What reconstruction costs: L1, squares (for PSNR) and edges."""
    error = guess - pixels
    return error.abs().mean() + error.square().mean() + recipe.vae.edge_weight * edges(guess, pixels)


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Decibels, per picture, for pictures in [-1, 1]: peak is 2."""
    return 10 * torch.log10(4 / (a - b).square().flatten(1).mean(1))


@torch.no_grad()
def reconstruct(vae: Vae, pictures: Tensor) -> Tensor:
    out = []
    for part in pictures.split(32):
        with fit.autocast():
            out.append(vae(part.to(fit.device())).sample.float().clamp(-1, 1).cpu())
    return torch.cat(out)


def unseen(recipe: StarterRecipe, style: str = "openmoji") -> Tensor:
    """Centred pictures of one style on white, in [-1, 1]."""
    rgba = drawings(recipe, style)
    scene = Scene(style, "white", ((0, 0.5, 0.5, 0.94),))
    pictures = [paint(one[None], scene, recipe.data.size) for one in rgba]
    return torch.stack(pictures).float() / 127.5 - 1


def train(recipe: StarterRecipe) -> None:
    sets = {style: drawings(recipe, style) for style in recipe.data.base_styles}
    vae = build(recipe)
    job = fit.Fit(
        "vae", vae, recipe.build, steps=recipe.vae.steps, peak=recipe.vae.learning_rate, warmup=100, ema=0.995
    )

    def loss_of(step: int) -> Tensor:
        pixels = batch(recipe, sets, step).to(fit.device())
        with fit.autocast():
            posterior = vae.encode(pixels).latent_dist
            noise = torch.randn(posterior.mean.shape, generator=fit.generator(recipe.vae.seed, step))
            latents = posterior.mean + posterior.std * noise.to(pixels.device)
            guess = vae.decode(latents).sample
        pressure = recipe.vae.kl_weight * posterior.kl().float().mean()
        return likeness(recipe, guess.float(), pixels) + pressure

    truth = unseen(recipe)[::8]
    for step, loss in job.run(loss_of):
        with job.averaged():
            score = psnr(reconstruct(vae, truth), truth).mean()
        print(
            f"vae {step}/{job.steps} loss {loss:.4f} unseen PSNR {score:.2f} dB {job.seconds:.0f} s",
            flush=True,
        )
    finish(recipe, vae, job)


def finish(recipe: StarterRecipe, vae: Vae, job: fit.Fit) -> None:
    """Measure the latents' spread, so that scaled latents have unit variance, and save."""
    vae.load_state_dict(job.average)
    seen = torch.cat([unseen(recipe, style)[::4] for style in recipe.data.base_styles])
    with torch.no_grad():
        latents = torch.cat([vae.encode(p.to(fit.device())).latent_dist.mean for p in seen.split(32)])
    vae.register_to_config(scaling_factor=round(1 / float(latents.std()), 5))
    vae.save_pretrained(recipe.build / "vae")


def polish(recipe: StarterRecipe) -> None:
    """Train the decoder further with the encoder frozen: latents, and all that was trained on them, stay."""
    vae = load(recipe.build / "vae").train()
    half = nn.ModuleDict({"post_quant_conv": vae.post_quant_conv, "decoder": vae.decoder})
    half.requires_grad_(True)
    sets = {style: drawings(recipe, style) for style in recipe.data.base_styles}
    job = fit.Fit(
        "decoder",
        half,
        recipe.build,
        steps=recipe.vae.decoder_steps,
        peak=recipe.vae.learning_rate / 2,
        warmup=100,
        ema=0.998,
    )

    def loss_of(step: int) -> Tensor:
        pixels = batch(recipe, sets, recipe.vae.steps + step).to(fit.device())
        with fit.autocast():
            with torch.no_grad():
                latents = vae.encode(pixels).latent_dist.mean
            guess = vae.decode(latents).sample
        return likeness(recipe, guess.float(), pixels)

    truth = unseen(recipe)[::8]
    for step, loss in job.run(loss_of):
        with job.averaged():
            vae.save_pretrained(recipe.build / "vae")
            score = psnr(reconstruct(vae, truth), truth).mean()
        print(
            f"decoder {step}/{job.steps} loss {loss:.4f} unseen PSNR {score:.2f} dB {job.seconds:.0f} s",
            flush=True,
        )


def load(folder: Path) -> Vae:
    vae: Vae = AutoencoderKL.from_pretrained(folder)
    return vae.to(fit.device()).eval().requires_grad_(False)
