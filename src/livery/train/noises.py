"""The noise that a row is trained with, drawn from the row's own random numbers, on the CPU."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from livery.nouns import NoiseSpec


def draw_noise(shape: Sequence[int], random: torch.Generator, spec: NoiseSpec) -> Tensor:
    """The noise of one row, [C, h, w].

    Gaussian; with `pyramid` also coarser noises; with `offset` also a constant per channel, so that a
    picture's mean brightness is learned too: Guttenberg 2023, crosslabs.org/blog/diffusion-with-offset-noise.
    """
    noise = torch.randn(*shape, generator=random)
    if spec.pyramid:
        noise = _with_octaves(noise, random, spec.pyramid)
    if spec.offset:
        noise = noise + spec.offset * torch.randn(shape[0], 1, 1, generator=random)
    return noise


def perturbed(noise: Tensor, random: torch.Generator, spec: NoiseSpec) -> Tensor:
    """The noise that is mixed in, while the target stays `noise`: input perturbation.

    noise + strength x another noise: Ning et al. 2023 (arXiv:2301.11706), equation 10.
    """
    if not spec.input_perturbation:
        return noise
    return noise + spec.input_perturbation * torch.randn(noise.shape, generator=random)


def _with_octaves(noise: Tensor, random: torch.Generator, discount: float) -> Tensor:
    """Noise plus ever coarser noises, each half the size and `discount` as strong, brought back to spread 1.

    Multi-resolution noise, Whitaker 2023, wandb.ai/johnowhitaker/multires_noise, with octaves of 2 where
    he draws the ratios at random.
    """
    channels, height, width = noise.shape
    total, strength = noise, 1.0
    while min(height, width) > 1:
        height, width, strength = height // 2, width // 2, strength * discount
        coarse = torch.randn(1, channels, height, width, generator=random)
        total = total + strength * functional.interpolate(coarse, noise.shape[1:], mode="bilinear")[0]
    return total / total.std()
