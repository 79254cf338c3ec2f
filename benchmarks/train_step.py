"""How much the cache of latents and prompt encodings saves per training step.

Usage: python benchmarks/train_step.py [--base FOLDER|tiny|starter] [--steps N] [--batch N]

Runs the same optimiser steps on the same rows two ways, in turns in one process: from the cache, and
with the autoencoder and the text encoder in the loop, as a plain script does. CPU seconds count, so that
other work on the machine matters little. Peak memory is the process's: the cached way goes first.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from livery.models.backbone import Backbone, Conditioning
from livery.models.device import device_name, peak_memory_bytes, resolve
from livery.models.load import load_backbone
from livery.models.sd1 import SD1
from livery.nouns import LiveryError, Photo, PicturesSpec, Recipe
from livery.train.batches import Plan, Row
from livery.train.buckets import Framing, Shown, shown_pixels
from livery.train.cache import Encodings, TensorCache
from livery.train.learner import Learner
from livery.tuners.tuner import attach_all, build


class InTheLoop(Encodings):
    """Encodes pictures and prompts of each batch anew."""

    def __init__(self, backbone: Backbone, folder: Path) -> None:
        cache = TensorCache(folder)
        super().__init__(backbone, cache, paint, PicturesSpec(), towers_train=False)
        self.base = backbone

    @torch.no_grad()
    def latents(self, rows: Sequence[Shown]) -> Tensor:
        pixels = torch.stack([shown_pixels(paint(row.photo), row.view) for row in rows])
        return self.base.encode_images(pixels.to(self.base.device))

    @torch.no_grad()
    def prompts(self, rows: Sequence[Row]) -> Conditioning:
        size = torch.tensor([row.size for row in rows], dtype=torch.float32, device=self.base.device)
        return replace(self.base.encode_prompts([row.caption for row in rows]), size=size)


def paint(photo: Photo) -> Image.Image:
    return Image.new("RGB", (photo.width, photo.height), (int(photo.sha256, 16) * 6 % 256, 99, 200))


def photos(side: int) -> list[Photo]:
    return [
        Photo(sha256=f"{i:064x}", width=side, height=side, captions=(f"a picture of {i}",)) for i in range(40)
    ]


def choose(name: str) -> Backbone:
    """The base of that name; without one the starter, or the tiny model where there is no starter."""
    if name == "tiny":
        return SD1.tiny()
    try:
        return load_backbone(name or "starter")
    except LiveryError:
        if name:
            raise
        return SD1.tiny()


def seconds(work: Callable[[], object]) -> float:
    """CPU seconds of the work; on CUDA, seconds until the card has done it."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        started = time.perf_counter()
        work()
        torch.cuda.synchronize()
        return time.perf_counter() - started
    started = time.process_time()
    work()
    return time.process_time() - started


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    arguments.add_argument("--base", default="", help="'tiny', 'starter', or a diffusers folder")
    arguments.add_argument("--steps", type=int, default=10)
    arguments.add_argument("--batch", type=int, default=8)
    arguments.add_argument("--precision", default="auto", choices=["auto", "fp32", "bf16"])
    given = arguments.parse_args()
    base = choose(given.base)
    recipe = Recipe(batch_size=given.batch, precision=given.precision)
    rows = photos(base.resolution)
    print(
        f"{base.family}, {base.resolution} px, batch {given.batch}, {resolve(recipe.precision, base.device)},"
    )
    print(f"{device_name(base.device)}, {torch.get_num_threads()} threads")
    with tempfile.TemporaryDirectory() as folder:
        compare(base, recipe, rows, Path(folder), given.steps)


def compare(base: Backbone, recipe: Recipe, rows: list[Photo], folder: Path, steps: int) -> None:
    plan = Plan(rows, recipe, Framing.of(recipe, base))
    cached = Encodings(base, TensorCache(folder), paint, recipe.pictures, towers_train=False)
    plain, captions = InTheLoop(base, folder), plan.captions()
    filling = seconds(lambda: [None for _ in cached.fill(plan.shown(), captions)].clear())
    attached = attach_all([build(spec) for spec in recipe.tuners], base)
    ways = {
        "cached": Learner(recipe, base, attached, plan, cached),
        "in the loop": Learner(recipe, base, attached, plan, plain),
    }
    peaks: dict[str, int] = {}
    for name, learner in ways.items():
        learner.step(0)
        peaks[name] = peak_memory_bytes(base.device)
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(1, steps + 1):
        for name, learner in ways.items():
            taken[name].append(seconds(lambda learner=learner, number=number: learner.step(number)))
    middle = {name: statistics.median(times) for name, times in taken.items()}
    for name in ways:
        print(f"{name:>12}: {middle[name]:.3f} CPU s per step, peak memory {peaks[name] / 2**20:.0f} MiB")
    print(f"       ratio: {middle['in the loop'] / middle['cached']:.2f} x faster from the cache")
    print(f"  to fill it: {filling:.2f} CPU s once, for {len(rows)} pictures and {len(captions)} captions")


if __name__ == "__main__":
    main()
