"""Held-out loss on a fixed grid: the same photos, timesteps and noises at every validation of every run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from livery.models.backbone import Backbone
from livery.models.device import Precision, autocast
from livery.models.noise import NoiseProcess
from livery.nouns import LossSpec, Photo
from livery.train.batches import Row, random_of
from livery.train.cache import Encodings
from livery.train.loss import row_errors

TIMESTEPS = 8
"""Noise levels per photo, spread evenly from the cleanest to the noisiest."""
PHOTOS = 64
"""At most this many held-out photos are used: the first ones."""


@dataclass(frozen=True)
class Grid:
    """What to validate on, and how: `batch_size` changes the time it takes, not the result."""

    rows: tuple[Row, ...]
    loss: LossSpec
    precision: Precision
    batch_size: int

    def cells(self, law: NoiseProcess) -> list[tuple[Row, float]]:
        """Every photo with every noise level, those of one size side by side."""
        levels = law.levels(TIMESTEPS).tolist()
        rows = sorted(self.rows[:PHOTOS], key=size_of)
        return [(row, level) for row in rows for level in levels]

    def batches(self, law: NoiseProcess) -> Iterator[list[tuple[Row, float]]]:
        """The cells in batches of one size."""
        for _, group in groupby(self.cells(law), key=lambda cell: size_of(cell[0])):
            cells = list(group)
            for first in range(0, len(cells), self.batch_size):
                yield cells[first : first + self.batch_size]


@torch.no_grad()
def held_out_loss(backbone: Backbone, law: NoiseProcess, grid: Grid, encodings: Encodings) -> float:
    """The mean over the grid of the error as training weighs it, so both curves share one axis.

    Photos' own weights do not count. The noise of a cell hangs on its photo and level alone.
    """
    total = sum(float(_errors(backbone, law, grid, encodings, cells).sum()) for cells in grid.batches(law))
    return total / len(grid.cells(law))


def _errors(
    backbone: Backbone,
    law: NoiseProcess,
    grid: Grid,
    encodings: Encodings,
    cells: Sequence[tuple[Row, float]],
) -> Tensor:
    """Weighted errors [B] of some cells of the grid."""
    rows = [row for row, _ in cells]
    clean = encodings.latents(rows)
    t = torch.tensor([level for _, level in cells], device=clean.device)
    noise = torch.stack([_noise(row.photo, level, clean[0]) for row, level in cells]).to(clean.device)
    prompts = encodings.prompts(rows)
    with autocast(clean.device, grid.precision, clean[0, 0].numel()):
        prediction = backbone.predict(law.mix(clean, noise, t), t, prompts)
    return row_errors(prediction, law.target(clean, noise, t)) * law.weight(t, grid.loss)


def _noise(photo: Photo, level: float, like: Tensor) -> Tensor:
    return torch.randn(like.shape, generator=random_of("held-out", photo.sha256, str(level)))


def size_of(row: Row) -> tuple[int, int]:
    """The size in pixels at which a row is shown; rows of one batch share it."""
    return row.view.width, row.view.height
