"""Adapters, and the record of the run that made one."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt

from livery.nouns.base import Noun, Sha256
from livery.nouns.recipe import MemorySpec, Recipe


class AdapterCard(Noun):
    """What an adapter file says of itself; lives in its safetensors metadata.

    It holds no time or machine, so that the same run always writes the same bytes.
    """

    recipe: Recipe
    family: str
    base_sha256: Sha256
    dataset: Sha256 | None = Field(default=None, description="none when it was not trained here")
    origin: str = Field(default="", description="how it came about, when not by training: one sentence")
    trigger_words: tuple[str, ...] = ()
    licences: tuple[str, ...] = ()
    attributions: tuple[str, ...] = ()
    livery_version: str
    step: NonNegativeInt = Field(description="optimiser steps taken; 0 when they are not known")


class Adapter(Noun):
    """Trained tensors in one safetensors blob, and their card."""

    sha256: Sha256
    card: AdapterCard


def with_trigger(caption: str, trigger: str) -> str:
    """The caption with the trigger words behind it, unless they are in it already (in any case)."""
    if not trigger or trigger.casefold() in caption.casefold():
        return caption
    return f"{caption}, {trigger}" if caption else trigger


class Step(Noun):
    """One optimiser step: the mean loss of its rows."""

    kind: Literal["step"] = "step"
    step: PositiveInt
    loss: float
    learning_rate: NonNegativeFloat


class Validation(Noun):
    """Loss on a fixed grid of timesteps and noises; step 0 is untrained."""

    kind: Literal["validation"] = "validation"
    step: NonNegativeInt
    loss: float = Field(description="over the held-out photos")
    train: float | None = Field(default=None, description="over as many training photos, on the same grid")
    score: float | None = Field(default=None, description="by a given judge; higher is better")


class Sample(Noun):
    """A picture drawn while training; `sha256` is its PNG blob."""

    kind: Literal["sample"] = "sample"
    step: NonNegativeInt
    prompt: str
    sha256: Sha256


class Saved(Noun):
    """A checkpoint was written: the run can continue from `step`."""

    kind: Literal["saved"] = "saved"
    step: NonNegativeInt


class Run(Noun):
    """The record of one training: its curves, its cost, and what came out."""

    recipe: Recipe
    dataset: Sha256
    base_sha256: Sha256
    adapter: Sha256 = Field(description="id of the Adapter")
    steps: tuple[Step, ...]
    validations: tuple[Validation, ...]
    samples: tuple[Sample, ...] = ()
    chosen_step: NonNegativeInt | None = Field(default=None, description="of the checkpoint that was kept")
    ended: str = Field(default="", description="why the run ended: one sentence")
    seconds: NonNegativeFloat
    peak_memory_bytes: NonNegativeInt
    device: str


class Estimate(Noun):
    """What a run will take, said before it begins. The `formula_` values are before correction."""

    recipe: Sha256
    dataset: Sha256
    base: str
    family: str
    method: str = Field(description="the kinds of the tuners, joined by +")
    device: str
    memory: MemorySpec = Field(description="the plan: what 'auto' stands for here")
    peak_memory_bytes: NonNegativeInt = Field(description="of the card on CUDA, else of the process")
    memory_parts: dict[str, NonNegativeInt] = Field(description="what the peak is made of, before correction")
    seconds: NonNegativeFloat = Field(description="the whole run, encoding and looks included")
    step_seconds: NonNegativeFloat = Field(description="one optimiser step")
    disk_bytes: NonNegativeInt = Field(description="cache, checkpoints and adapter")
    kilowatt_hours: NonNegativeFloat
    watts_from: str
    price_per_hour: NonNegativeFloat | None = None
    cost: NonNegativeFloat | None = None
    probe_steps: NonNegativeInt = Field(default=0, description="steps that were measured; 0 = formula alone")
    formula_bytes: NonNegativeInt
    formula_seconds: NonNegativeFloat
    earlier_runs: NonNegativeInt = Field(default=0, description="measured runs that corrected this")
    memory_error: NonNegativeFloat = Field(description="share by which the peak may be off")
    time_error: NonNegativeFloat = Field(description="share by which the time may be off")
