"""What a run holds in memory under a plan, counted before it begins; and the plan that 'auto' stands for."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from pydantic import ValidationError
from torch import nn

from livery.models.backbone import Backbone
from livery.models.device import free_memory_bytes, resident_bytes, resolve
from livery.nouns import Dataset, LiveryError, MemorySpec, OptimizerSpec, Recipe
from livery.train.buckets import Framing
from livery.train.dryrun import Size, Work, caching_work, held_after, part_bytes, shadow, step_work
from livery.train.memory import applied
from livery.tuners.tuner import attach_all, build

STATE_BYTES = {"adamw": 8.0, "adamw8bit": 2.1, "adafactor": 0.1, "prodigy": 16.0, "lion": 4.0}
"""Per trained number, beside its own 4 bytes and its gradient's 4."""
EMA_BYTES = 4.0
LIBRARIES = {"fp32": 60_000_000, "bf16": 90_000_000, "fp16": 90_000_000}
"""What torch takes on a CPU once it works: kernels made on first use, threads. Measured on Linux, x86-64."""
ALLOCATOR = 1.03
"""What allocators lose to rounding and gaps."""
ROOM = 0.92
"""Of the free memory, what a plan may fill."""
PLENTY = 2 << 30
"""Free bytes, above `_at_most`, with which a CPU run is not looked at: it would take longer than it tells."""
CHOICES: tuple[dict[str, str | bool], ...] = (
    {},
    {"offload": True},
    {"checkpointing": True},
    {"checkpointing": True, "offload": True},
    {"checkpointing": True, "offload": True, "fused_backward": True},
    {"checkpointing": True, "offload": True, "weights": "int8"},
    {"checkpointing": True, "offload": True, "weights": "int4"},
)
"""Memory plans from the fastest to the smallest."""


@dataclass(frozen=True)
class Footprint:
    """What a run holds under one plan, in bytes, and the work of one batch."""

    lasting: dict[str, int]
    """Held in every step."""
    passing: dict[str, int]
    """Held at some time, never together: the most of these counts."""
    learned: int
    """What trains."""
    work: Work

    @property
    def peak(self) -> int:
        return sum(self.lasting.values()) + max(self.passing.values())


@dataclass(frozen=True)
class Subject:
    """A run that is looked at before it begins: what it trains is attached."""

    recipe: Recipe
    backbone: Backbone
    size: Size
    towers_train: bool
    process: int
    """Bytes of the process beside the backbone's weights; 0 on a card."""
    hidden: int
    """Bytes that attaching took beside what can be seen in the modules: copies to undo from."""

    def footprint(self, memory: MemorySpec) -> Footprint:
        """Under one plan. A compiled step is counted as one that is not."""
        on_card = self.backbone.device.type != "cpu"
        with shadow(self.backbone) as copied:
            caching = caching_work(copied, self.size)
            plain = _weights(copied, self.towers_train)
            learned = sum(p.nbytes for part in copied.modules().values() for p in _learning(part))
            if memory.fused_backward:
                _drop_gradients(copied)
            with applied(copied, memory.model_copy(update={"compile": False})):
                at_work, idle = _weights(copied, self.towers_train)
                work = step_work(copied, self.size, self.recipe.precision, towers_train=self.towers_train)
        waits = on_card and memory.offload
        states = round(learned / 4 * state_bytes(self.recipe.optimizer))
        precision = resolve(self.recipe.precision, self.backbone.device)
        lasting = {
            "process": self.process,
            "libraries at work": 0 if on_card else LIBRARIES[precision],
            "weights": at_work + (0 if waits else idle),
            "kept to undo": self.hidden,
            "optimiser": states,
        }
        passing = {
            "activations and gradients": round(work.peak_bytes * ALLOCATOR),
            "encoding": max(0, (max(plain) if waits else sum(plain)) - lasting["weights"])
            + caching.peak_bytes,
        }
        if not on_card:  # an adapter is made in the host's memory: the last gradients, a copy, its bytes
            passing["saving"] = (2 if memory.fused_backward else 3) * learned
        return Footprint(lasting, passing, learned, work)


@contextmanager
def looked_at(recipe: Recipe, backbone: Backbone, dataset: Dataset) -> Generator[Subject]:
    """The run with its tuners attached; detached in the end."""
    framing = Framing.of(recipe, backbone)
    tuners = [build(spec) for spec in recipe.tuners]
    whole = sum(part_bytes(part) for part in (backbone.vae, *backbone.modules().values()))
    process = max(0, resident_bytes() - whole) if backbone.device.type == "cpu" else 0
    views = [v for p in dataset.split("train") for v in framing.views(p.width, p.height)]
    if not views:
        raise LiveryError(f"dataset '{dataset.name}' has no photo in its split 'train'")
    largest = max(views, key=lambda view: view.width * view.height)
    size = Size(recipe.batch_size, largest.height, largest.width)
    before = sum(part_bytes(part) for part in backbone.modules().values())
    attached, made = held_after(lambda: attach_all(tuners, backbone, recipe.seed))
    try:
        grown = sum(part_bytes(part) for part in backbone.modules().values()) - before
        towers_train = any("towers" in each.touches for each in tuners)
        yield Subject(recipe, backbone, size, towers_train, process, max(0, made - grown))
    finally:
        attached.undo()


# ---------------------------------------------------------------------------- the plan


def choose(recipe: Recipe, backbone: Backbone, dataset: Dataset) -> tuple[MemorySpec, str]:
    """The plan for a run, and the sentence that says why.

    A manual plan is taken as it is. 'auto' is the fastest one that fits the free memory; where even the
    smallest does not, it is taken nevertheless, and said.
    """
    spec = recipe.memory
    if spec.mode == "manual":
        return spec, ""
    plans = list(plans_for(recipe, backbone))
    free = free_memory_bytes(backbone.device)
    if backbone.device.type == "cpu" and free > PLENTY + _at_most(recipe, backbone):
        return plans[0], ""
    looked: list[tuple[int, MemorySpec]] = []
    with looked_at(recipe, backbone, dataset) as subject:
        for plan in plans:
            looked.append((subject.footprint(plan).peak - _held(backbone), plan))
            if looked[-1][0] <= ROOM * free:
                break
    fits = looked[-1][0] <= ROOM * free
    needed, plan = looked[-1] if fits else min(looked, key=lambda one: one[0])
    text = (
        f"Memory: {plan.summary}, the fastest that fits"
        if fits
        else f"Memory: even {plan.summary} may not fit"
    )
    return plan, f"{text}: {_gib(needed)} more are needed, {_gib(free)} are free."


def plans_for(recipe: Recipe, backbone: Backbone) -> Iterator[MemorySpec]:
    """The plans that may stand for 'auto', the fastest first; those that the recipe contradicts left out."""
    on_card = backbone.device.type != "cpu"
    half = resolve(recipe.precision, backbone.device)
    for choice in CHOICES:
        if not on_card and "offload" in choice:
            choice = {key: value for key, value in choice.items() if key != "offload"}
            if choice.keys() <= {"checkpointing"}:
                continue  # it is in the list already, or comes without
        weights = half if on_card else "fp32"
        memory = {"weights": weights, **choice, "compile": recipe.memory.compile, "mode": "manual"}
        try:
            yield Recipe.model_validate({**recipe.model_dump(), "memory": memory}).memory
        except ValidationError:
            continue


def _held(backbone: Backbone) -> int:
    """What is held now and counts in a peak."""
    if backbone.device.type == "cuda":
        return torch.cuda.memory_allocated(backbone.device)
    return resident_bytes()


# ---------------------------------------------------------------------------- counting


def state_bytes(optimizer: OptimizerSpec) -> float:
    """What an optimiser keeps per trained number."""
    return STATE_BYTES[optimizer.kind] + (EMA_BYTES if optimizer.ema else 0)


def _learning(part: nn.Module) -> list[nn.Parameter]:
    return [param for param in part.parameters() if param.requires_grad]


def _weights(backbone: Backbone, towers_train: bool) -> tuple[int, int]:
    """Bytes of the parts at work, and of those that idle while it learns."""
    towers = [part_bytes(tower) for tower in backbone.towers.values()]
    at_work = part_bytes(backbone.denoiser) + (sum(towers) if towers_train else 0)
    return at_work, part_bytes(backbone.vae) + (0 if towers_train else sum(towers))


def _at_most(recipe: Recipe, backbone: Backbone) -> int:
    """A generous rule of thumb: copies, gradients and moments of all weights, and twice them per row."""
    whole = sum(part_bytes(part) for part in (backbone.vae, *backbone.modules().values()))
    return (6 + 2 * recipe.batch_size) * whole


def _drop_gradients(backbone: Backbone) -> None:
    """As the fused backward does: no gradient outlives its use."""
    for part in backbone.modules().values():
        for param in _learning(part):
            param.register_post_accumulate_grad_hook(lambda each: setattr(each, "grad", None))


def _gib(size: float) -> str:
    return f"{size / (1 << 30):.1f} GiB"
