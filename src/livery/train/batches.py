"""Which photo, caption and random numbers each row of each step gets: functions of (seed, row).

Nothing here has a state, so a resumed run needs none, and the rows of a step are the same
however they are cut into batches.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from livery.nouns import Photo, Recipe, with_trigger


@dataclass(frozen=True)
class Row:
    """One row of a batch; `random` is its own source of timestep and noise, on the CPU."""

    photo: Photo
    caption: str
    random: torch.Generator


def random_of(*names: int | str) -> torch.Generator:
    """A CPU generator whose seed is the hash of its names, so streams never run into each other."""
    digest = hashlib.sha256("/".join(str(name) for name in names).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def captions_of(photo: Photo, trigger: str) -> tuple[str, ...]:
    """All captions a photo is trained with; at least one, if only the empty one."""
    return tuple(with_trigger(caption, trigger) for caption in photo.captions or ("",))


def batches_of_step(photos: Sequence[Photo], recipe: Recipe, step: int) -> Iterator[list[Row]]:
    """The `accumulate` batches of `batch_size` rows of step 0, 1, ..."""
    for batch in range(recipe.accumulate):
        first = (step * recipe.accumulate + batch) * recipe.batch_size
        yield [row(photos, recipe, index) for index in range(first, first + recipe.batch_size)]


def row(photos: Sequence[Photo], recipe: Recipe, index: int) -> Row:
    """The row number `index` of the whole run: every photo once per epoch, in the epoch's own order."""
    epoch, place = divmod(index, len(photos))
    photo = photos[_order(len(photos), recipe.seed, epoch)[place]]
    random = random_of(recipe.seed, "row", index)
    captions = captions_of(photo, recipe.trigger)
    choice = int(torch.randint(len(captions), (), generator=random))
    dropped = float(torch.rand((), generator=random)) < recipe.captions.dropout
    return Row(photo, "" if dropped else captions[choice], random)


@lru_cache(maxsize=4)
def _order(count: int, seed: int, epoch: int) -> list[int]:
    return torch.randperm(count, generator=random_of(seed, "epoch", epoch)).tolist()
