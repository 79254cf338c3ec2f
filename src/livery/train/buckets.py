"""Aspect-ratio buckets: each picture at a size near its own shape, so that little is cut off.

A picture's bucket is worked out from its shape, not looked up in a list: the largest sides that are
multiples of the base's step, keep the shape to a step, and have at most the area asked for. So no
picture within `max_ratio` loses more than one step of one side. What is left over is cut evenly at
the sides and from the bottom, never from the top, where heads are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from livery.models.backbone import Backbone
from livery.nouns import LiveryError, Photo, Recipe


@dataclass(frozen=True, slots=True)
class View:
    """How a picture is shown, in pixels: resized to `resized` (width, height), `width` x `height` cut out
    of it with its left upper corner at (`left`, `top`), then mirrored if `flipped`.
    """

    width: int
    height: int
    resized: tuple[int, int]
    left: int
    top: int
    flipped: bool = False

    @property
    def cut(self) -> float:
        """The share of the picture that is not shown: 0 to 1."""
        return 1 - self.width * self.height / (self.resized[0] * self.resized[1])

    @property
    def numbers(self) -> tuple[int, ...]:
        """All that makes the view: for names."""
        return self.width, self.height, *self.resized, self.left, self.top, int(self.flipped)

    def mirrored(self) -> View:
        """The same pixels mirrored. Its `left` is that of the cut in the mirrored picture."""
        left = self.resized[0] - self.width - self.left
        return View(self.width, self.height, self.resized, left, self.top, not self.flipped)


@dataclass(frozen=True, slots=True)
class Shown:
    """A photo and how it is shown: what latents and masks are made of."""

    photo: Photo
    view: View

    @property
    def size(self) -> tuple[int, int, int, int, int, int]:
        """(original h, w, crop top, left, target h, w) in pixels; crops count in the resized picture.

        SDXL's micro-conditioning: Podell et al. 2023 (arXiv:2307.01952), section 2.2.
        """
        view = self.view
        return self.photo.height, self.photo.width, view.top, view.left, view.height, view.width


@dataclass(frozen=True)
class Framing:
    """Where pictures of any shape are cut, as a recipe asks of a base."""

    sides: tuple[int, ...]
    """Sides in pixels of the squares of equal area; a picture is shown once at each."""
    step: int
    """Pixels that widths and heights are multiples of."""
    buckets: bool = True
    max_ratio: float = 4.0
    upscale: bool = True

    @classmethod
    def of(cls, recipe: Recipe, backbone: Backbone) -> Self:
        """Raises LiveryError for a side or a step that does not fit the base."""
        pictures, factor = recipe.pictures, backbone.latent.factor
        sides = pictures.resolutions or (backbone.resolution,)
        step = (pictures.bucket_step or backbone.bucket_step) if pictures.buckets else factor
        if step % factor:
            near = max(1, round(step / factor)) * factor
            raise LiveryError(
                f"pictures.bucket_step {step} is not a multiple of {factor}, as this base needs: try {near}."
            )
        for side in sides:
            if not pictures.buckets and side % step:
                near = max(1, round(side / step)) * step
                raise LiveryError(
                    f"resolution {side} is not a multiple of {step}, as this base needs: try {near}."
                )
            if side < step:
                raise LiveryError(
                    f"resolution {side} is below {step}, the smallest side of a bucket: raise it."
                )
        return cls(sides, step, pictures.buckets, pictures.max_ratio, pictures.upscale)

    def views(self, width: int, height: int) -> tuple[View, ...]:
        """How a picture of this size is shown: once per side, in the order of the sides."""
        return tuple(self.view(width, height, side) for side in self.sides)

    def view(self, width: int, height: int, side: int) -> View:
        """How a picture of this size is shown at one side."""
        if not self.buckets:
            return cover(width, height, (side, side), keep_top=False)
        return cover(width, height, self.bucket(width, height, side))

    def bucket(self, width: int, height: int, side: int) -> tuple[int, int]:
        """(width, height) in pixels of the picture's bucket; its area is at most side x side.

        Without `upscale` it is no larger than the picture, unless the picture is smaller than a step.
        """
        short, long = sorted((width, height))
        ratio = min(long / short, self.max_ratio)
        cells = side * side // self.step**2
        half = 0.5 if self.upscale else 0.0  # round to the nearest step, or down
        a, b = 1, 1  # sides in steps
        for a in range(max(1, (side if self.upscale else min(side, short)) // self.step), 0, -1):
            b = max(int(a * ratio), min(int(a * ratio + half), int(a * self.max_ratio), cells // a))
            if a * b <= cells:
                break
        b = min(b, max(1, cells // a))
        return (a * self.step, b * self.step) if height > width else (b * self.step, a * self.step)


def cover(width: int, height: int, bucket: tuple[int, int], *, keep_top: bool = True) -> View:
    """The view that fills the bucket (width, height) and loses least of a picture of this size."""
    scale = max(bucket[0] / width, bucket[1] / height)
    resized = max(bucket[0], round(width * scale)), max(bucket[1], round(height * scale))
    left = (resized[0] - bucket[0]) // 2
    top = 0 if keep_top else (resized[1] - bucket[1]) // 2
    return View(*bucket, resized, left, top)


def shown_pixels(image: Image.Image, view: View) -> Tensor:
    """A picture as it is shown: -> [3, height, width] in [-1, 1]. Lanczos, antialiased."""
    part = np.array(_shown(image.convert("RGB"), view), dtype=np.float32)
    return torch.from_numpy(part).permute(2, 0, 1) / 127.5 - 1


def shown_mask(mask: Image.Image, view: View, factor: int) -> Tensor:
    """A grey mask as it is shown, one number per latent cell: -> [1, height/factor, width/factor] in [0, 1].

    A cell's number is the mean over the pixels that it stands for: the share of it that is white.
    """
    grey = np.array(_shown(mask.convert("L"), view), dtype=np.float32) / 255
    whole = torch.from_numpy(grey)[None, None]
    return torch.nn.functional.avg_pool2d(whole, factor)[0]


def _shown(image: Image.Image, view: View) -> Image.Image:
    box = (view.left, view.top, view.left + view.width, view.top + view.height)
    if not view.flipped:
        return image.resize(view.resized, Image.Resampling.LANCZOS).crop(box)
    return ImageOps.mirror(_shown(image, view.mirrored()))
