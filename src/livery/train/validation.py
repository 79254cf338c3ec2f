"""Loss on a fixed grid, the same photos, timesteps and noises at every validation of every run; and what
follows from the curve: which step was best, whether to go on, how much of the gain is memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Self

import torch
from torch import Tensor

from livery.models.backbone import Backbone
from livery.models.device import Precision, autocast
from livery.models.noise import NoiseProcess
from livery.nouns import Dataset, LossSpec, Photo, Recipe, StopSpec, Validation
from livery.train.batches import Row, held_out_row, random_of
from livery.train.buckets import Framing
from livery.train.cache import Encodings
from livery.train.loss import row_errors

TIMESTEPS = 8
"""Noise levels per photo, spread evenly from the cleanest to the noisiest."""
PHOTOS = 64
"""At most this many held-out photos are used, the first ones; and as many training photos."""


@dataclass(frozen=True)
class Grid:
    """What to validate on, and how: `batch_size` changes the time it takes, not the result."""

    rows: tuple[Row, ...]
    loss: LossSpec
    precision: Precision
    batch_size: int

    @classmethod
    def of(cls, photos: Sequence[Photo], recipe: Recipe, framing: Framing) -> Self:
        rows = tuple(held_out_row(photo, recipe, framing) for photo in photos[:PHOTOS])
        return cls(rows, recipe.loss, recipe.precision, recipe.batch_size)

    def cells(self, law: NoiseProcess) -> list[tuple[Row, float]]:
        """Every photo with every noise level, those of one size side by side."""
        levels = law.levels(TIMESTEPS).tolist()
        rows = sorted(self.rows, key=size_of)
        return [(row, level) for row in rows for level in levels]

    def batches(self, law: NoiseProcess) -> Iterator[list[tuple[Row, float]]]:
        """The cells in batches of one size."""
        for _, group in groupby(self.cells(law), key=lambda cell: size_of(cell[0])):
            cells = list(group)
            for first in range(0, len(cells), self.batch_size):
                yield cells[first : first + self.batch_size]


@torch.no_grad()
def grid_loss(backbone: Backbone, law: NoiseProcess, grid: Grid, encodings: Encodings) -> float:
    """The mean over the grid of the error as training weighs it, so both curves share one axis.

    Photos' own weights do not count. The noise of a cell hangs on its photo and level alone.
    """
    errors = [_errors(backbone, law, grid, encodings, cells) for cells in grid.batches(law)]
    return float(torch.cat(errors).double().mean())


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
        errors = row_errors(prediction, law.target(clean, noise, t), grid.loss, encodings.masks(rows))
    return errors * law.weight(t, grid.loss)


def _noise(photo: Photo, level: float, like: Tensor) -> Tensor:
    return torch.randn(like.shape, generator=random_of("held-out", photo.sha256, str(level)))


def size_of(row: Row) -> tuple[int, int]:
    """The size in pixels at which a row is shown; rows of one batch share it."""
    return row.view.width, row.view.height


def watched(dataset: Dataset) -> tuple[list[Photo], list[Photo]]:
    """The photos of both curves: those held out, and as many that are trained on, the class's aside."""
    held_out = list(dataset.split("validation"))[:PHOTOS]
    trained = sorted(
        (photo for photo in dataset.split("train") if not photo.prior), key=lambda photo: photo.sha256
    )
    return held_out, trained[: len(held_out)]


# ---------------------------------------------------------------------------- what the curve says


def better(new: Validation, old: Validation, stop: StopSpec) -> bool:
    """Whether one look is better than another by more than `min_gain`: by score where both have one."""
    if new.score is not None and old.score is not None:
        return new.score > old.score + stop.min_gain * abs(old.score)
    return new.loss < old.loss * (1 - stop.min_gain)


def best(validations: Sequence[Validation], stop: StopSpec) -> Validation | None:
    """The best look so far, the base's own aside: an untrained adapter is no choice."""
    found: Validation | None = None
    for each in validations:
        if each.step and (found is None or better(each, found, stop)):
            found = each
    return found


def waited(validations: Sequence[Validation], stop: StopSpec) -> int:
    """Looks since the best one."""
    found = best(validations, stop)
    return sum(each.step > found.step for each in validations) if found else 0


def change(validations: Sequence[Validation], at: Validation) -> tuple[float, float | None] | None:
    """Held-out and training loss at a look as shares of the base's: (0.8, 0.5) = 20% and 50% below.

    Their difference is the gap: what was gained on seen photos alone. None when the base was not looked at.
    """
    base = next((each for each in validations if each.step == 0), None)
    if base is None or not base.loss:
        return None
    return at.loss / base.loss, at.train / base.train if at.train is not None and base.train else None
