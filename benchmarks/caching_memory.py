"""Peak memory of a whole run, encoding included, as the number of pictures grows.

Usage: python benchmarks/caching_memory.py [--pictures 50,500,5000] [--steps 20] [--side 32]

Each count is a run of its own process: synthetic pictures, painted when they are asked for, are encoded
into an empty cache and trained on by a LoRA of the tiny model. What may grow is the manifest of the
dataset (a few kilobytes per picture) and, up to its bound, what the cache keeps in memory.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

MIB = 1 << 20


def run(count: int, steps: int, side: int) -> dict[str, float]:
    """Train on `count` pictures in this process; its peak memory and seconds."""
    import torch
    from PIL import Image

    from livery.models.sd1 import SD1
    from livery.nouns import Dataset, LowRankSpec, Photo, PicturesSpec, Recipe
    from livery.train.loop import train

    torch.set_num_threads(1)
    shapes = [(200, 200), (300, 200), (200, 300), (320, 180)]

    def paint(photo: Photo) -> Image.Image:
        return Image.effect_noise((photo.width, photo.height), 1 + int(photo.sha256, 16) % 100)

    photos = tuple(
        Photo(sha256=f"{i:064x}", width=shapes[i % 4][0], height=shapes[i % 4][1], captions=(f"picture {i}",))
        for i in range(count)
    )
    recipe = Recipe(
        tuners=(LowRankSpec(rank=4),),
        steps=steps,
        batch_size=4,
        pictures=PicturesSpec(resolutions=(side,)),
        validate_every=0,
        checkpoint_every=steps,
        stop={"keep": "last"},  # pyright: ignore[reportArgumentType]
    )
    began, before = time.monotonic(), _peak()
    with tempfile.TemporaryDirectory() as folder:
        dataset = Dataset(name="synthetic", photos=photos)
        for _ in train(recipe, SD1.tiny(), dataset, pixels=paint, folder=Path(folder)):
            pass
    return {"before": before, "peak": _peak(), "seconds": time.monotonic() - began}


def _peak() -> float:
    """The most memory this process has had, in MiB."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / MIB


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    arguments.add_argument("--pictures", default="50,500,5000")
    arguments.add_argument("--steps", type=int, default=20)
    arguments.add_argument("--side", type=int, default=32, help="pixels; latents are half of it")
    arguments.add_argument("--one", type=int, help=argparse.SUPPRESS)
    given = arguments.parse_args()
    if given.one:
        print(json.dumps(run(given.one, given.steps, given.side)))
        return
    print(f"{'pictures':>8}  {'loaded MiB':>10}  {'peak MiB':>8}  {'seconds':>7}")
    first = 0.0
    for count in map(int, given.pictures.split(",")):
        command = [sys.executable, __file__, "--one", str(count), "--steps", str(given.steps)]
        done = subprocess.run(
            [*command, "--side", str(given.side)], capture_output=True, text=True, check=True
        )
        told = json.loads(done.stdout.splitlines()[-1])
        first = first or told["peak"]
        grown = f"  {100 * (told['peak'] / first - 1):+.1f}%" if told["peak"] != first else ""
        print(
            f"{count:>8}  {told['before']:>10.0f}  {told['peak']:>8.0f}  {told['seconds']:>7.1f}{grown}",
            flush=True,
        )


if __name__ == "__main__":
    main()
