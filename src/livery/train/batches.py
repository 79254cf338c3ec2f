"""Which photo, caption and random numbers each row of each step gets: functions of (seed, row).

Nothing here has a state, so a resumed run needs none, and the rows of a step are the same whether it
goes on or begins there.

The rows of a batch share one bucket. Each bucket has an endless row of its own: all its pictures in a
new order, then all again, and so on; a batch takes the next `batch_size` of them. In every epoch a
bucket gives as many whole batches as its pictures fill. What does not fill one waits for the next
epoch, so no batch is short, no picture is left out and none is shown more often than another. Epochs
mix the batches of all buckets. To keep small buckets from all waiting for the same epoch, each starts
with a part of a batch, drawn from the seed, counted as filled.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from livery.nouns import LiveryError, Photo, Recipe
from livery.train.buckets import Framing, Shown, cover
from livery.train.captions import form, forms, plain, random_of, texts_of

__all__ = ["Plan", "Row", "batches_of_step", "held_out_row", "random_of"]


@dataclass(frozen=True, slots=True)
class Row(Shown):
    """One row of a batch; `random` is its own source of timestep and noise, on the CPU."""

    caption: str
    weight: float
    """The photo's own, times the prior's for a row of the class."""
    random: torch.Generator
    prior: bool = False
    """Shows the class, not the subject: DreamBooth."""
    keeps_base: bool = False
    """Its target is what the base itself predicts, with nothing attached."""


@dataclass(frozen=True)
class Bucket:
    """What is shown at one size."""

    subjects: tuple[Shown, ...]
    classes: tuple[Shown, ...]
    """Class photos, cut to this size; the subjects themselves where the base's answer is preserved."""
    phase: int
    """Rows counted as filled before the first."""

    @property
    def rows(self) -> int:
        """Rows per epoch: the subjects, and as many of the class where there are any."""
        return len(self.subjects) * (2 if self.classes else 1)


class Plan:
    """The order of all rows of a run."""

    def __init__(self, photos: Sequence[Photo], recipe: Recipe, framing: Framing) -> None:
        """`photos` are those to learn from, class photos among them; at least one is of the subject."""
        self.recipe = recipe
        subjects = [photo for photo in photos if not photo.prior]
        classes = [photo for photo in photos if photo.prior and recipe.prior.kind == "photos"]
        if recipe.prior.kind == "photos" and not classes:
            raise LiveryError(
                "prior.kind is 'photos' but there is no class photo: give some, or let them be drawn"
            )
        self.buckets = _buckets(subjects, classes, recipe, framing)
        self._first, self._batches = 0, self._epoch(0)  # of the epoch that was asked for last

    def shown(self) -> Iterator[Shown]:
        """Every picture in every way that a row may show it; each once."""
        flip = self.recipe.pictures.flip
        all_shown = (one for bucket in self.buckets for one in bucket.subjects + bucket.classes)
        for one in {(one.photo.sha256, one.view): one for one in all_shown}.values():
            if flip < 1:
                yield one
            if flip > 0:
                yield Shown(one.photo, one.view.mirrored())

    def captions(self) -> set[str]:
        """Every text that a row may be trained on."""
        recipe = self.recipe
        photos = {one.photo.sha256: one.photo for bucket in self.buckets for one in bucket.subjects}
        texts = {text for photo in photos.values() for text in texts_of(photo, recipe)}
        texts |= {""} if recipe.captions.dropout else set()
        return texts | ({recipe.prior.prompt} if any(bucket.classes for bucket in self.buckets) else set())

    def bucket_of(self, batch: int) -> tuple[Bucket, int]:
        """The bucket of batch 0, 1, ... of the run, and how many batches it gave before."""
        if not self._first <= batch < self._first + len(self._batches):
            # The last epoch that begins no later than this batch.
            bound = (batch + 1 + len(self.buckets)) * self.recipe.batch_size
            epoch = bisect_right(range(bound + 1), batch, key=self._before) - 1
            self._first, self._batches = self._before(epoch), self._epoch(epoch)
        bucket, earlier = self._batches[batch - self._first]
        return self.buckets[bucket], earlier

    def _before(self, epoch: int) -> int:
        """Batches of all epochs before this one."""
        return sum(self._given(bucket, epoch) for bucket in self.buckets)

    def _given(self, bucket: Bucket, epochs: int) -> int:
        """Batches that a bucket gives in the first epochs."""
        return (bucket.rows * epochs + bucket.phase) // self.recipe.batch_size

    def _epoch(self, epoch: int) -> list[tuple[int, int]]:
        """Batches of one epoch in their order: (bucket, number of the batch within the bucket)."""
        first = [self._given(bucket, epoch) for bucket in self.buckets]
        after = [self._given(bucket, epoch + 1) for bucket in self.buckets]
        labels = [index for index in range(len(first)) for _ in range(first[index], after[index])]
        order: list[tuple[int, int]] = []
        for place in torch.randperm(
            len(labels), generator=random_of(self.recipe.seed, "mix", epoch)
        ).tolist():
            order.append((labels[place], first[labels[place]]))
            first[labels[place]] += 1
        return order


def batches_of_step(plan: Plan, step: int) -> Iterator[list[Row]]:
    """The `accumulate` batches of `batch_size` rows of step 0, 1, ...; all rows of a batch share one size.

    Several processes each take their part of every batch: neighbouring rows.
    """
    recipe = plan.recipe
    for number in range(step * recipe.accumulate, (step + 1) * recipe.accumulate):
        bucket, earlier = plan.bucket_of(number)
        first = earlier * recipe.batch_size
        yield [
            _row(
                bucket,
                recipe,
                first + place,
                random_of(recipe.seed, "row", number * recipe.batch_size + place),
            )
            for place in range(recipe.batch_size)
        ]


def held_out_row(photo: Photo, recipe: Recipe, framing: Framing) -> Row:
    """A photo as validation shows it: at the first side, never mirrored, with its plain caption."""
    view = framing.view(photo.width, photo.height, framing.sides[0])
    return Row(photo, view, plain(photo, recipe), 1.0, random_of("held-out", photo.sha256))


def _row(bucket: Bucket, recipe: Recipe, place: int, random: torch.Generator) -> Row:
    """Row number `place` of a bucket. With class rows, the odd ones are theirs."""
    if not bucket.classes:
        return _subject(_at(bucket.subjects, recipe.seed, "epoch", place), recipe, random)
    number, of_class = divmod(place, 2)
    if not of_class:
        return _subject(_at(bucket.subjects, recipe.seed, "epoch", number), recipe, random)
    # Rows of the base's own answer show the subject of the row before them: same pictures, other words.
    keeps_base = recipe.prior.kind == "prediction"
    shown = _at(bucket.classes, recipe.seed, "epoch" if keeps_base else "class epoch", number)
    shown = _maybe_mirrored(shown, recipe, random)
    weight = shown.photo.weight * recipe.prior.weight
    return Row(shown.photo, shown.view, recipe.prior.prompt, weight, random, True, keeps_base)


def _subject(shown: Shown, recipe: Recipe, random: torch.Generator) -> Row:
    """Draws only for what varies, so that a choice not asked for changes no other row."""
    captions = shown.photo.captions or ("",)
    caption = captions[int(torch.randint(len(captions), (), generator=random))]
    dropped = float(torch.rand((), generator=random)) < recipe.captions.dropout
    count = forms(recipe)
    number = int(torch.randint(count, (), generator=random)) if count > 1 else 0
    shown = _maybe_mirrored(shown, recipe, random)
    text = "" if dropped else form(caption, number, recipe)
    return Row(shown.photo, shown.view, text, shown.photo.weight, random)


def _maybe_mirrored(shown: Shown, recipe: Recipe, random: torch.Generator) -> Shown:
    flip = recipe.pictures.flip
    if not flip or float(torch.rand((), generator=random)) >= flip:
        return shown
    return Shown(shown.photo, shown.view.mirrored())


def _at(shown: Sequence[Shown], seed: int, name: str, place: int) -> Shown:
    """Number `place` of an endless row in which all come once, in a new order, then all again."""
    epoch, within = divmod(place, len(shown))
    return shown[_order(len(shown), seed, name, epoch)[within]]


@lru_cache(maxsize=128)
def _order(count: int, seed: int, name: str, epoch: int) -> array[int]:
    return array("I", torch.randperm(count, generator=random_of(seed, name, epoch)).tolist())


# ----------------------------------------------------------------------------- what is shown at which size


def _buckets(
    subjects: Sequence[Photo], classes: Sequence[Photo], recipe: Recipe, framing: Framing
) -> list[Bucket]:
    sizes: dict[tuple[int, int], list[Shown]] = {}
    for photo in subjects:
        for view in framing.views(photo.width, photo.height):
            sizes.setdefault((view.width, view.height), []).extend([Shown(photo, view)] * photo.repeats)
    ordered = sorted(sizes.items(), key=lambda item: (item[0][0] / item[0][1], item[0]))
    shared = _share_out(classes, [(size, len(shown)) for size, shown in ordered], framing)
    made: list[Bucket] = []
    for (size, shown), of_class in zip(ordered, shared, strict=True):
        if recipe.prior.kind != "photos":
            of_class = tuple(shown) if recipe.prior.kind == "prediction" else ()
        phase = int(torch.randint(recipe.batch_size, (), generator=random_of(recipe.seed, "phase", *size)))
        made.append(Bucket(tuple(shown), of_class, phase))
    return made


def _share_out(
    classes: Sequence[Photo], sizes: Sequence[tuple[tuple[int, int], int]], framing: Framing
) -> list[tuple[Shown, ...]]:
    """Class photos shared out to the subjects' buckets, as a batch has one size: each photo to one bucket.

    Both stand in the order of their shape, and each bucket gets its share of the rows, so that little
    is cut. A bucket whose share is below one photo borrows the nearest.
    """
    if not classes:
        return [()] * len(sizes)
    ordered = sorted(classes, key=lambda photo: (photo.width / photo.height, photo.sha256))
    rows, before = sum(count for _, count in sizes), 0
    found: list[tuple[Shown, ...]] = []
    for size, count in sizes:
        first, last = before * len(ordered) // rows, (before + count) * len(ordered) // rows
        part = ordered[first:last] or [ordered[min(first, len(ordered) - 1)]]
        views = [cover(p.width, p.height, size, keep_top=framing.buckets) for p in part]
        found.append(tuple(Shown(photo, view) for photo, view in zip(part, views, strict=True)))
        before += count
    return found
