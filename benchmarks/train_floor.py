"""Our training loop against the best bare loop known, over the same cached tensors: how much the house costs.

Usage: python benchmarks/train_floor.py [--base tiny|starter|FOLDER] [--steps N] [--batch N] [--startup RUNS]

Same process, model, adapter and optimiser settings; steps take turns, A B A B, and medians of CPU seconds
count, so that other work on the machine matters little. The bare loop first chooses, by measurement, between
fused and written-out attention, and between convolutions and matrix products for frozen small ones; `ours`
must keep up with the best of the four. `--startup` also compares, in processes of their own, the command up
to its first optimiser step (caches warm) with importing and loading the same model by hand.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.nn.functional as F
from flat_pictures import encoded
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from livery.models.backbone import Backbone, Conditioning
from livery.models.device import HALF, device_name, resolve
from livery.models.load import load_backbone
from livery.models.sd1 import SD1
from livery.nouns import LowRankSpec, MemorySpec, Recipe
from livery.train.attention import attending, fastest
from livery.train.cache import Encodings
from livery.train.learner import Learner
from livery.tuners.tuner import Attached, attach_all, build

TARGET, STARTUP_TARGET = 1.03, 1.3


@dataclass(frozen=True)
class Floor:
    """The bare loop: tensors, one forward and backward pass, one optimiser; nothing is told or kept."""

    base: Backbone
    latents: Tensor
    prompts: Tensor
    params: list[nn.Parameter]
    optimizer: torch.optim.Optimizer
    batch: int
    dtype: torch.dtype | None
    weights: Tensor

    def step(self, number: int) -> float:
        count = len(self.latents)
        rows = torch.tensor([(number * self.batch + i) % count for i in range(self.batch)])
        clean, noise = self.latents[rows], torch.randn(self.batch, *self.latents.shape[1:])
        law: Any = self.base.noise
        t = torch.randint(len(self.weights), (self.batch,))
        cast = torch.autocast("cpu", self.dtype) if self.dtype else nullcontext()
        with cast:
            guess = self.base.predict(law.mix(clean, noise, t), t, Conditioning(self.prompts[rows]))
        errors = (guess.float() - law.target(clean, noise, t)).square().flatten(1).mean(1)
        loss = (errors * self.weights[t]).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(self.params, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())


def as_matrix_product(layer: nn.Conv2d) -> Callable[[Tensor], Tensor]:
    """The same convolution as an unfolding and one matrix product."""

    def forward(x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        size = layer.kernel_size[0]
        columns = x.flatten(2) if size == 1 else F.unfold(x, size, padding=size // 2)
        product = layer.weight.flatten(1) @ columns
        product = product if layer.bias is None else product + layer.bias[:, None]
        return product.view(len(x), -1, height, width)

    return forward


@contextmanager
def matrix_products(model: nn.Module) -> Generator[None]:
    """Frozen 1x1 and 3x3 convolutions of stride 1 as matrix products."""
    layers = [
        m
        for m in model.modules()
        if isinstance(m, nn.Conv2d) and m.stride == (1, 1) and m.kernel_size[0] <= 3
    ]
    for layer in layers:
        setattr(layer, "forward", as_matrix_product(layer))  # noqa: B010 - its parameter is named otherwise
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


@contextmanager
def attention(model: nn.Module, plain: bool) -> Generator[None]:
    """Attention of one kind inside the model, whatever is chosen around it."""
    kinds = [SDPBackend.MATH] if plain else [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
    forward = model.forward

    def with_kind(*args: Any, **kwargs: Any) -> Any:
        with sdpa_kernel(kinds):
            return forward(*args, **kwargs)

    model.forward = with_kind
    try:
        yield
    finally:
        del model.forward


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    arguments.add_argument("--base", default="tiny", help="'tiny', 'starter', or a diffusers folder")
    arguments.add_argument("--steps", type=int, default=20)
    arguments.add_argument("--batch", type=int, default=8)
    arguments.add_argument("--precision", default="auto", choices=["auto", "fp32", "bf16"])
    arguments.add_argument("--startup", type=int, default=0, help="pairs of processes to compare; 0 = none")
    given = arguments.parse_args()
    if given.steps:
        compare(given)
    if given.startup:
        startup(given.startup)


def compare(given: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    base = SD1.tiny() if given.base == "tiny" else load_backbone(given.base)
    recipe = Recipe(
        batch_size=given.batch,
        precision=given.precision,
        tuners=(LowRankSpec(rank=8),),
        steps=10**6,
        memory=MemorySpec(mode="manual"),
    )
    precision = resolve(recipe.precision, base.device)
    print(f"{given.base}, {base.resolution} px, batch {given.batch}, LoRA rank 8, {precision}, one thread")
    print(device_name(base.device))
    with tempfile.TemporaryDirectory() as folder:
        learner, encodings, attached = ours(base, recipe, Path(folder))
        floor = bare(base, recipe, encodings, learner, attached, HALF.get(precision))
        best = levers(base, floor, max(3, given.steps // 2))
        kind = fastest(base, learner.plan, encodings, Path(folder) / "attention.json")
        print(f"livery's loop measured for itself and took {kind} attention")

        def our_step(number: int) -> None:
            with attending(base.denoiser, kind):
                learner.step(number)

        versus(our_step, lambda number: way(floor, *best, number), given.steps)


def ours(base: Backbone, recipe: Recipe, folder: Path) -> tuple[Learner, Encodings, Attached]:
    plan, encodings = encoded(base, recipe, base.resolution, 16, folder)
    attached = attach_all([build(spec) for spec in recipe.tuners], base)
    return Learner(recipe, base, attached, plan, encodings), encodings, attached


def bare(
    base: Backbone,
    recipe: Recipe,
    encodings: Encodings,
    learner: Learner,
    attached: Attached,
    dtype: torch.dtype | None,
) -> Floor:
    """Over the very tensors that the learner reads, and the very parameters that it moves."""
    rows = next(iter(learner.plan.buckets)).subjects
    latents = torch.cat([encodings.latents([row]) for row in rows])
    prompts = torch.cat([base.encode_prompts([f"picture {i}"]).tokens for i in range(len(rows))]).detach()
    params = list(attached.params.values())
    optimizer = torch.optim.AdamW(params, lr=recipe.learning_rate, weight_decay=0.01, fused=True)
    levels = torch.arange(int(getattr(base.noise, "timesteps", 1000)))
    return Floor(
        base,
        latents,
        prompts,
        params,
        optimizer,
        recipe.batch_size,
        dtype,
        base.noise.weight(levels, recipe.loss),
    )


def way(floor: Floor, plain: bool, products: bool, number: int) -> float:
    """One bare step with the levers set so."""
    model = floor.base.denoiser
    with attention(model, plain), matrix_products(model) if products else nullcontext():
        return floor.step(number)


def levers(base: Backbone, floor: Floor, steps: int) -> tuple[bool, bool]:
    """The four ways of the bare loop in turns; the fastest."""
    times: dict[tuple[bool, bool], list[float]] = {
        (plain, products): [] for plain in (True, False) for products in (False, True)
    }
    for number in range(steps + 1):
        for plain, products in times:
            times[plain, products].append(cpu_seconds(partial(way, floor, plain, products, number)))
    middle = {chosen: statistics.median(taken[1:]) for chosen, taken in times.items()}
    print("bare loop, CPU seconds per step:")
    for (plain, products), taken in middle.items():
        names = "written-out" if plain else "fused", "matrix products" if products else "convolutions"
        print(f"  {names[0]:>11} attention, {names[1]:<15} {taken:.4f}")
    return min(middle, key=lambda chosen: middle[chosen])


def versus(our_step: Callable[[int], Any], bare_step: Callable[[int], Any], steps: int) -> None:
    """Ours and the best bare loop in turns; the ratio of each pair, and the median of those."""
    mine: list[float] = []
    theirs: list[float] = []
    for number in range(steps + 2):
        turns = [(mine, partial(our_step, number)), (theirs, partial(bare_step, number))]
        for times, work in turns if number % 2 else reversed(turns):
            times.append(cpu_seconds(work))
    ratios = [a / b for a, b in zip(mine[2:], theirs[2:], strict=True)]
    middle, low, high = statistics.median(ratios), *statistics.quantiles(ratios, n=4)[::2]
    ours_middle, bare_middle = statistics.median(mine[2:]), statistics.median(theirs[2:])
    print(f"ours {ours_middle:.4f}, best bare loop {bare_middle:.4f} CPU seconds per step")
    verdict = "kept" if middle <= TARGET else "MISSED"
    print(f"ratio {middle:.3f} (quartiles {low:.3f} to {high:.3f}); target {TARGET}: {verdict}")


def cpu_seconds(work: Callable[[], Any]) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began


# ---------------------------------------------------------------------------- start-up

BARE = """
import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from peft import LoraConfig
from transformers import CLIPTextModel, CLIPTokenizer
import sys
folder = sys.argv[1]
parts = [
    UNet2DConditionModel.from_pretrained(folder, subfolder="unet"),
    AutoencoderKL.from_pretrained(folder, subfolder="vae"),
    CLIPTextModel.from_pretrained(folder, subfolder="text_encoder"),
    CLIPTokenizer.from_pretrained(folder + "/tokenizer"),
    DDPMScheduler.from_pretrained(folder, subfolder="scheduler"),
]
print("ready", flush=True)
"""


def startup(runs: int) -> None:
    """CPU seconds up to the first optimiser step, against importing and loading by hand."""
    from livery.models.load import starter_folder
    from livery.starter import brand_folder

    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        recipe = work / "recipe.toml"
        recipe.write_text("steps = 1\nbatch_size = 8\nvalidate_every = 0\n[stop]\ncheck_effect_at = 0\n")
        livery = [sys.executable, "-m", "livery"]
        place = ["-w", str(work / "work"), "--json"]
        told = subprocess.run(
            [*livery, "ingest", str(brand_folder() / "photos"), *place],
            capture_output=True,
            text=True,
            check=True,
        )
        assert '"ingested"' in told.stdout
        listed = subprocess.run(
            [*livery, "list", "Dataset", *place], capture_output=True, text=True, check=True
        )
        data = json.loads(listed.stdout.splitlines()[0])["id"]
        train = [*livery, "train", str(recipe), "--data", data, "--restart", *place]
        subprocess.run(train, capture_output=True, check=True)  # fills the cache
        pairs = [
            (
                until(train, '"kind":"step"'),
                until([sys.executable, "-c", BARE, str(starter_folder())], "ready"),
            )
            for _ in range(runs)
        ]
    ratio = statistics.median(mine / theirs for mine, theirs in pairs)
    mine, theirs = (statistics.median(each) for each in zip(*pairs, strict=True))
    verdict = "kept" if ratio <= STARTUP_TARGET else "MISSED"
    print(f"start-up: first step after {mine:.1f}, bare import and load {theirs:.1f} CPU seconds")
    print(f"ratio {ratio:.2f}; target {STARTUP_TARGET}: {verdict}")


def until(command: list[str], sign: str) -> float:
    """CPU seconds that a process has taken when it says this."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if sign in line.replace(" ", ""):
                spent = psutil.Process(process.pid).cpu_times()
                process.kill()
                return spent.user + spent.system
    raise SystemExit(f"{command[:4]} ended without saying {sign}")


if __name__ == "__main__":
    main()
