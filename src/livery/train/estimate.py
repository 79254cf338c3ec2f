"""What a run will take, before it begins: memory, time, disk, energy, money.

Memory is counted in a dry run (`footprint.py`), time is worked out from its multiplications and the measured
speed of this machine. Runs that were estimated and then done correct the next estimate of their kind.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import torch

from livery.models.backbone import Backbone
from livery.models.device import device_name, peak_memory_bytes, resolve
from livery.nouns import Dataset, Estimate, LiveryError, Recipe, Run
from livery.train import costs
from livery.train.batches import Plan
from livery.train.buckets import Framing
from livery.train.checkpoint import KEPT
from livery.train.dryrun import Work
from livery.train.footprint import Footprint, choose, looked_at
from livery.train.validation import PHOTOS, TIMESTEPS

EFFICIENCY = {"cuda": 0.4}
"""Of the measured speed of large products, what a whole step reaches."""
CPU_EFFICIENCY = 0.5
CALL_SECONDS = 12e-6
"""What an operation costs beside its arithmetic."""
MEMORY_ERROR, MEASURED_MEMORY_ERROR = 0.15, 0.05
TIME_ERROR, CORRECTED_TIME_ERROR, MEASURED_TIME_ERROR = 1.0, 0.3, 0.15
SAMPLER_PASSES = 40
"""Forward passes per sample picture: 20 steps, with guidance."""
REMEMBERED = 5
"""Earlier runs of a kind that correct the next estimate."""


@dataclass(frozen=True)
class Probe:
    """Measured on warm steps of the run itself."""

    steps: int
    step_seconds: float
    peak_memory_bytes: int


# ---------------------------------------------------------------------------- the estimate


def estimate(
    recipe: Recipe,
    backbone: Backbone,
    dataset: Dataset,
    *,
    earlier: Sequence[tuple[Estimate, Run]] = (),
    probe: Probe | None = None,
    price_per_hour: float | None = None,
) -> Estimate:
    """What the run will take. `earlier` are estimates and the runs that followed, newest first.

    Without a price, that of a card that is often rented; money stays none where there is none.
    """
    device, fitted = backbone.device, recipe.fitted(_learned_from(dataset))
    plan, _ = choose(fitted, backbone, dataset)
    with looked_at(fitted, backbone, dataset) as subject:
        footprint = subject.footprint(plan)
    begun = peak_memory_bytes(device) if device.type == "cpu" else 0
    formula = max(footprint.peak, begun)
    step = probe.step_seconds if probe else _step_seconds(footprint.work, fitted, device)
    seconds = _all_seconds(step, footprint.work, fitted, backbone, dataset)
    name, method = device_name(device), "+".join(spec.kind for spec in recipe.tuners)
    alike = [pair for pair in earlier if _alike(pair[0], name, backbone.family, method)][:REMEMBERED]
    memory_by = median(run.peak_memory_bytes / one.formula_bytes for one, run in alike) if alike else 1.0
    time_by = median(run.seconds / one.formula_seconds for one, run in alike) if alike and not probe else 1.0
    watts, watts_from = costs.watts(device)
    hours = seconds * time_by / 3600
    price = costs.rent(name) if price_per_hour is None else price_per_hour
    return Estimate(
        recipe=fitted.id,
        dataset=dataset.id,
        base=recipe.base,
        family=backbone.family,
        method=method,
        device=name,
        memory=plan,
        peak_memory_bytes=probe.peak_memory_bytes if probe else round(formula * memory_by),
        memory_parts={**footprint.lasting, **footprint.passing},
        seconds=seconds * time_by,
        step_seconds=step * time_by,
        disk_bytes=_disk_bytes(fitted, backbone, dataset, footprint),
        kilowatt_hours=watts * hours / 1000,
        watts_from=watts_from,
        price_per_hour=price,
        cost=None if price is None else price * hours,
        probe_steps=probe.steps if probe else 0,
        formula_bytes=formula,
        formula_seconds=seconds,
        earlier_runs=len(alike),
        memory_error=MEASURED_MEMORY_ERROR if probe or alike else MEMORY_ERROR,
        time_error=MEASURED_TIME_ERROR if probe else CORRECTED_TIME_ERROR if alike else TIME_ERROR,
    )


def compared(found: Estimate, run: Run) -> str:
    """What was estimated against what was measured, in a sentence."""
    memory, hours = run.peak_memory_bytes / found.peak_memory_bytes - 1, run.seconds / found.seconds - 1
    return (
        f"Estimated {found.seconds / 60:.1f} minutes and {found.peak_memory_bytes / 1e9:.2f} GB; it took "
        f"{run.seconds / 60:.1f} minutes ({hours:+.0%}) and {run.peak_memory_bytes / 1e9:.2f} GB "
        f"({memory:+.0%}). The next estimate learns from it."
    )


def refuse(found: Estimate, max_hours: float | None, max_cost: float | None) -> None:
    """Raises LiveryError when the run would take longer or cost more than allowed."""
    hours = found.seconds / 3600
    if max_hours is not None and hours > max_hours:
        raise LiveryError(
            f"the run would take about {hours:.2g} hours, --max-hours allows {max_hours:g}: lower steps, or "
            "raise the limit"
        )
    if max_cost is None:
        return
    if found.cost is None:
        raise LiveryError("--max-cost needs a price: give what an hour of this machine costs with --price")
    if found.cost > max_cost:
        raise LiveryError(
            f"the run would cost about {found.cost:.2f}, --max-cost allows {max_cost:g}: lower steps, or "
            "raise the limit"
        )


def _alike(one: Estimate, device: str, family: str, method: str) -> bool:
    return (one.device, one.family, one.method) == (device, family, method)


def _learned_from(dataset: Dataset) -> int:
    return sum(not photo.prior for photo in dataset.split("train"))


def _step_seconds(work: Work, recipe: Recipe, device: torch.device) -> float:
    """One optimiser step: arithmetic and calls; on a card they overlap."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    rate = costs.products_per_second(device, dtype[resolve(recipe.precision, device)])
    arithmetic = work.flops / (rate * EFFICIENCY.get(device.type, CPU_EFFICIENCY))
    calls = work.operations * CALL_SECONDS
    one = max(arithmetic, calls) if device.type == "cuda" else arithmetic + calls
    return one * recipe.accumulate


def _all_seconds(step: float, work: Work, recipe: Recipe, backbone: Backbone, dataset: Dataset) -> float:
    """Steps, looks and samples; a pass forward is a third of a step. Encoding is counted as it were once."""
    passed = step / recipe.accumulate / 3
    looks = recipe.steps // recipe.validate_every + 1 if recipe.validate_every else 0
    watched = 2 * min(PHOTOS, len(dataset.split("validation"))) * TIMESTEPS
    drawings = recipe.steps // recipe.sample_every + 1 if recipe.sample_every else 0
    rows = looks * watched + drawings * len(recipe.sample_prompts) * SAMPLER_PASSES
    shown = len(recipe.pictures.resolutions or (backbone.resolution,)) * len(dataset.photos)
    return recipe.steps * step + (rows + shown) / recipe.batch_size * passed


def _disk_bytes(recipe: Recipe, backbone: Backbone, dataset: Dataset, footprint: Footprint) -> int:
    """Latents and encoded captions, the checkpoints that are kept, and the adapter."""
    plan = Plan(dataset.split("train"), recipe, Framing.of(recipe, backbone))
    latent = backbone.latent
    cells = [one.view.width * one.view.height // latent.factor**2 for one in plan.shown()]
    with torch.no_grad():
        prompt = sum(part.nbytes for part in backbone.encode_prompts([""]).tensors().values())
    trained = footprint.learned
    checkpoint = trained + footprint.lasting["optimiser"]
    cache = 4 * latent.channels * sum(cells) + prompt * len(plan.captions())
    return round(cache + KEPT * checkpoint + trained)
