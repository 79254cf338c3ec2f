"""LoRA training on true shapes with random weights, on a CUDA card: speed, share of the card, peak memory.

Usage: python benchmarks/train_gpu.py [--only sd1.5,sdxl,sd3-medium] [--steps N] [--no-compile] [--tiny]

SD 1.5 at 512 px, SDXL and SD3-medium at 1024 px, LoRA of rank 16 on the attention and feed-forward layers,
bf16 with bf16 weights, batch 1 and the largest that fits, eager and with compiled blocks. Every number is of
our own learner's steps (loss, backward, clipping, AdamW), the pictures cached before. Prints the table of
docs/performance.md. `--tiny` runs the same code on tiny models on the CPU, to see that it works.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from flat_pictures import encoded

from livery import plugins
from livery.models.backbone import Backbone
from livery.models.device import device_name, peak_memory_bytes
from livery.nouns import LowRankSpec, MemorySpec, Recipe
from livery.train.costs import products_per_second
from livery.train.dryrun import Size, shadow, step_work
from livery.train.learner import Learner
from livery.train.memory import applied, waiting
from livery.tuners.tuner import attach_all, build

SIDES = {"sd1.5": 512, "sdxl": 1024, "sd3-medium": 1024}
TINY = {"sd1.5": "sd1", "sdxl": "sdxl", "sd3-medium": "sd3"}
LARGEST = 64
WARM = 3


@dataclass(frozen=True)
class Result:
    """One row of the table."""

    what: str
    batch: int
    way: str
    seconds: float
    flops: int
    peak: int


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    arguments.add_argument("--only", default=",".join(SIDES))
    arguments.add_argument("--steps", type=int, default=20)
    arguments.add_argument("--no-compile", action="store_true")
    arguments.add_argument("--tiny", action="store_true")
    given = arguments.parse_args()
    if not (torch.cuda.is_available() or given.tiny):
        raise SystemExit("this measures CUDA cards and there is none here; --tiny shows that it works")
    device = torch.device("cpu" if given.tiny else "cuda")
    rate = products_per_second(device, torch.bfloat16)
    print(f"{device_name(device)}, {rate / 1e12:.3g} TFLOP/s in bf16 products, torch {torch.__version__}\n")
    print(
        "| model | batch | way | s/step | images/s | of the card | peak GiB |\n|---|---|---|---|---|---|---|"
    )
    for name in given.only.split(","):
        if given.tiny and TINY[name] not in plugins.families():
            continue
        for way in ("eager", "compiled") if not (given.no_compile or given.tiny) else ("eager",):
            for result in measured(name, way, given.steps, device, given.tiny):
                print(row(result, rate), flush=True)


def row(found: Result, rate: float) -> str:
    share = found.flops / found.seconds / rate
    return (
        f"| {found.what} | {found.batch} | {found.way} | {found.seconds:.3f} "
        f"| {found.batch / found.seconds:.2f} | {share:.0%} | {found.peak / 2**30:.1f} |"
    )


def measured(name: str, way: str, steps: int, device: torch.device, tiny: bool) -> list[Result]:
    """Batch 1, and the largest power of two that fits."""
    base = random_base(name, device, tiny)
    side = base.resolution if tiny else SIDES[name]
    results = [one(base, name, way, side, 1, steps)]
    batch = 2
    while batch <= (2 if tiny else LARGEST):
        found = fits(lambda batch=batch: one(base, name, way, side, batch, steps))
        if found is None:
            break
        results = [results[0], found]
        batch *= 2
    return results


def random_base(name: str, device: torch.device, tiny: bool) -> Backbone:
    if tiny:
        return plugins.families()[TINY[name]].tiny()
    from livery.models.architectures import random_backbone

    return random_backbone(name, device)


def fits(work: Callable[[], Result]) -> Result | None:
    """The result; none when the card's memory does not suffice."""
    try:
        return work()
    except torch.cuda.OutOfMemoryError:
        gc.collect()
        torch.cuda.empty_cache()
        return None


def one(base: Backbone, name: str, way: str, side: int, batch: int, steps: int) -> Result:
    memory = MemorySpec(mode="manual", weights="bf16", offload=True, compile=way == "compiled")
    sha256 = base.sha256
    recipe = Recipe(
        base=name,
        batch_size=batch,
        precision="bf16",
        tuners=(LowRankSpec(rank=16),),
        steps=WARM + steps,
        memory=memory,
        pictures={"resolutions": [side], "buckets": False},  # pyright: ignore[reportArgumentType]
    )
    tuners = [build(spec) for spec in recipe.tuners]
    with tempfile.TemporaryDirectory() as folder, waiting(base, memory, towers_train=False):
        plan, encodings = encoded(base, recipe, side, 4, Path(folder))
        attached = attach_all(tuners, base)
        try:
            with shadow(base) as copied:
                work = step_work(copied, Size(batch, side, side), "bf16", towers_train=False)
            with applied(base, memory):
                if base.device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                seconds = timed(Learner(recipe, base, attached, plan, encodings, memory=memory), steps)
                peak = peak_memory_bytes(base.device)
        finally:
            attached.undo()
            base.sha256 = sha256
    return Result(f"{name}, {side} px", batch, way, seconds, work.flops, peak)


def timed(learner: Learner, steps: int) -> float:
    """Median seconds of a step; each ends with the one number that is read from the device."""
    times: list[float] = []
    for number in range(WARM + steps):
        began = time.perf_counter()
        learner.step(number)
        times.append(time.perf_counter() - began)
    return statistics.median(times[WARM:])


if __name__ == "__main__":
    main()
