"""Held-out loss on a fixed grid: the same photos, timesteps and noises at every validation of every run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from livery.models.backbone import Backbone
from livery.models.device import Precision, autocast
from livery.models.noise import NoiseProcess
from livery.nouns import LossSpec, Photo
from livery.train.batches import captions_of, random_of
from livery.train.cache import Encodings
from livery.train.loss import row_errors

TIMESTEPS = 8
"""Noise levels per photo, spread evenly from the cleanest to the noisiest."""
PHOTOS = 64
"""At most this many held-out photos are used: the first ones."""


@dataclass(frozen=True)
class Grid:
    """What to validate on, and how: `batch_size` changes the time it takes, not the result."""

    photos: tuple[Photo, ...]
    trigger: str
    loss: LossSpec
    precision: Precision
    batch_size: int

    def cells(self, law: NoiseProcess) -> list[tuple[Photo, float]]:
        """Every photo with every noise level."""
        levels = law.levels(TIMESTEPS).tolist()
        return [(photo, level) for photo in self.photos[:PHOTOS] for level in levels]


@torch.no_grad()
def held_out_loss(backbone: Backbone, law: NoiseProcess, grid: Grid, encodings: Encodings) -> float:
    """The mean over the grid of the error as training weighs it, so both curves share one axis.

    Photos' own weights do not count. The noise of a cell hangs on its photo and level alone.
    """
    cells = grid.cells(law)
    total = 0.0
    for first in range(0, len(cells), grid.batch_size):
        total += float(_errors(backbone, law, grid, encodings, cells[first : first + grid.batch_size]).sum())
    return total / len(cells)


def _errors(
    backbone: Backbone,
    law: NoiseProcess,
    grid: Grid,
    encodings: Encodings,
    cells: Sequence[tuple[Photo, float]],
) -> Tensor:
    """Weighted errors [B] of some cells of the grid."""
    photos = [photo for photo, _ in cells]
    clean = encodings.latents(photos)
    t = torch.tensor([level for _, level in cells], device=clean.device)
    noise = torch.stack([_noise(photo, level, clean[0]) for photo, level in cells]).to(clean.device)
    prompts = encodings.prompts([captions_of(photo, grid.trigger)[0] for photo in photos])
    with autocast(clean.device, grid.precision, clean[0, 0].numel()):
        prediction = backbone.predict(law.mix(clean, noise, t), t, prompts)
    return row_errors(prediction, law.target(clean, noise, t)) * law.weight(t, grid.loss)


def _noise(photo: Photo, level: float, like: Tensor) -> Tensor:
    return torch.randn(like.shape, generator=random_of("held-out", photo.sha256, str(level)))
