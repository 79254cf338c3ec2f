"""The recipe: everything one run needs, in sections, checked before any weight is read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Self, cast

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from livery.nouns.base import Noun, Share
from livery.nouns.contradictions import contradiction, doubts
from livery.nouns.tuning import SORTS, LowRankSpec, TunerSpec

VERSION = 2


class PicturesSpec(Noun):
    """How pictures become training rows."""

    resolutions: tuple[PositiveInt, ...] = Field(
        default=(), description="sides in pixels of the square of equal area; several = each picture at each"
    )
    buckets: bool = Field(default=True, description="keep each picture's shape; false = cut to squares")
    bucket_step: PositiveInt | None = Field(
        default=None, description="pixels that widths and heights are multiples of; default the base's"
    )
    max_ratio: float = Field(default=4.0, ge=1, description="longest bucket: long side over short side")
    upscale: bool = Field(default=True, description="false = small pictures go to smaller buckets")
    flip: Share = Field(default=0.0, description="share of rows mirrored; only for what has no sides")
    masks: Literal["ignore", "loss"] = Field(
        default="ignore", description="'loss': only what a photo's mask shows is learned"
    )
    unmasked_weight: Share = Field(default=0.0, description="what still counts outside a mask")


class CaptionsSpec(Noun):
    """How captions become prompts. Every row chooses its own, also with cached encodings."""

    dropout: Share = Field(default=0.1, description="share of rows trained on no caption")
    shuffle_tags: bool = Field(default=False, description="captions are tags: shuffle those behind keep_tags")
    keep_tags: NonNegativeInt = Field(default=1, description="first tags that are neither moved nor dropped")
    tag_dropout: Share = Field(default=0.0, description="share of the other tags left out in each row")
    separator: str = Field(default=",", min_length=1, description="between tags")
    trigger_place: Literal["first", "last"] = Field(
        default="last", description="where the trigger goes in a caption that lacks it"
    )
    variants: PositiveInt = Field(
        default=8, description="shuffled or thinned forms of each caption; each form's encoding is cached"
    )


class LossSpec(Noun):
    """What an error is, and how much each counts."""

    weighting: Literal["none", "min-snr", "debiased"] = Field(
        default="min-snr", description="per noise level; rectified flow has none of these and takes 'none'"
    )
    min_snr_gamma: PositiveFloat = Field(
        default=5.0, description="signal-to-noise ratio above which rows count less; papers and people use 5"
    )
    kind: Literal["mse", "huber"] = Field(
        default="mse", description="'huber' forgives rows that are far off: pictures that do not fit the rest"
    )
    huber_delta: PositiveFloat = Field(default=0.1, description="errors above it count linearly")
    zero_terminal_snr: bool = Field(
        default=False, description="rescale the schedule to end in pure noise; for v-prediction"
    )


class NoiseSpec(Noun):
    """Which noise is mixed in, and at which levels."""

    offset: NonNegativeFloat = Field(default=0.0, description="strength of a constant per channel")
    pyramid: Share = Field(default=0.0, description="discount of each coarser octave; 0 = off, 0.3 is usual")
    input_perturbation: NonNegativeFloat = Field(
        default=0.0, description="strength of extra noise on the input alone; 0.1 is usual"
    )
    timesteps: Literal["uniform", "logit-normal"] | None = Field(
        default=None, description="default: uniform for diffusion, logit-normal for rectified flow"
    )
    logit_mean: float = Field(default=0.0, description="of the levels' logit; above 0 = more noise")
    logit_std: PositiveFloat = Field(
        default=1.0, description="of the levels' logit; less = more in the middle"
    )
    shift: PositiveFloat | None = Field(
        default=None, description="rectified flow: moves levels to more noise; default the base's"
    )


class OptimizerSpec(Noun):
    """How gradients move weights."""

    kind: Literal["adamw", "adamw8bit", "adafactor", "prodigy", "lion"] = Field(
        default="adamw",
        description="less memory: 'adamw8bit' (with livery[cuda]), 'adafactor'; 'prodigy' finds its rate",
    )
    weight_decay: NonNegativeFloat = Field(default=0.01, description="pull of weights to zero")
    betas: tuple[Share, Share] | None = Field(default=None, description="default the optimiser's own")
    clip_norm: PositiveFloat = Field(default=1.0, description="largest length of the gradient")
    schedule: Literal["constant", "cosine", "linear", "cosine-restarts"] = Field(
        default="cosine", description="how the learning rate falls to 0 after the warm-up, or does not"
    )
    warmup_steps: NonNegativeInt = Field(
        default=20, description="steps in which the learning rate rises from 0"
    )
    restarts: PositiveInt = Field(default=3, description="cycles of 'cosine-restarts'")
    ema: float = Field(default=0.0, ge=0, lt=1, description="decay of the running mean that is kept; 0 = off")


class PriorSpec(Noun):
    """DreamBooth: what keeps the base's idea of the class, Ruiz et al. 2022 (arXiv:2208.12242)."""

    kind: Literal["none", "photos", "prediction"] = Field(
        default="none",
        description="'photos': class photos with their own loss; 'prediction': the base's own answer",
    )
    prompt: str = Field(default="", description="the class: 'a dog'")
    count: PositiveInt = Field(default=200, description="class photos; those missing are drawn by the base")
    weight: PositiveFloat = Field(default=1.0, description="of a class row; a subject's row is 1")
    seed: NonNegativeInt = Field(
        default=0, description="of the first class photo drawn; the next ones count up"
    )


class MemorySpec(Noun):
    """What is traded for memory. 'auto' takes the fastest set that fits the device, and says which."""

    mode: Literal["auto", "manual"] = Field(
        default="auto", description="'manual': the keys below as they are written"
    )
    weights: Literal["fp32", "bf16", "fp16", "int8", "int4"] = Field(
        default="fp32", description="of the frozen base; quantised ones only where it does not train"
    )
    checkpointing: bool = Field(default=False, description="recompute activations in the backward pass")
    offload: bool = Field(default=False, description="parts that idle wait in the host's memory")
    fused_backward: bool = Field(
        default=False, description="each weight moves as soon as its gradient is there; full fine-tuning"
    )
    compile: bool = Field(default=False, description="compile the denoiser's blocks; pays on long GPU runs")

    @property
    def summary(self) -> str:
        """For people: "frozen weights in bf16, activations recomputed"."""
        words = {
            "activations recomputed": self.checkpointing,
            "idle parts on the host": self.offload,
            "fused backward": self.fused_backward,
            "compiled blocks": self.compile,
        }
        return ", ".join([f"frozen weights in {self.weights}", *(text for text, on in words.items() if on)])


class StopSpec(Noun):
    """When to look, when to stop, and which checkpoint to end with."""

    patience: NonNegativeInt = Field(
        default=0, description="validations without a better one before the run stops; 0 = run to the end"
    )
    min_gain: NonNegativeFloat = Field(default=0.0, description="share by which a better one must be better")
    keep: Literal["best", "last"] = Field(default="best", description="by held-out loss, or the last step")
    check_effect_at: NonNegativeInt = Field(
        default=50, description="step at which an adapter without effect is an error; 0 = never"
    )
    explode: float = Field(default=20.0, gt=1, description="loss over its running median that ends a run")


class Recipe(Noun):
    """Everything one run needs, frozen, stored whole in the adapter."""

    version: int = Field(default=VERSION, ge=VERSION, le=VERSION, description="of these keys")
    base: str = Field(default="starter", description="'starter', a folder, a checkpoint file or a hub id")
    family: str | None = Field(default=None, description="default: read from the base")
    tuners: tuple[TunerSpec, ...] = Field(
        default=(LowRankSpec(),), min_length=1, description="what changes: one [[tuners]] table each"
    )
    trigger: str = Field(default="", description="words that call the style; put into captions")
    steps: PositiveInt = Field(default=400, description="optimiser steps")
    steps_per_photo: PositiveFloat | None = Field(
        default=None, description="instead of steps: this x training photos, within min_steps and max_steps"
    )
    min_steps: PositiveInt = Field(default=100, description="fewest that steps_per_photo may come to")
    max_steps: PositiveInt = Field(default=20_000, description="most that steps_per_photo may come to")
    batch_size: PositiveInt = Field(default=8, description="rows per forward pass")
    accumulate: PositiveInt = Field(default=1, description="batches per optimiser step")
    learning_rate: PositiveFloat = Field(default=1e-3, description="per optimiser step")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        default="auto", description="of the arithmetic; auto: bf16 where the processor has it"
    )
    validate_every: NonNegativeInt = Field(default=100, description="optimiser steps; 0 = never")
    sample_every: NonNegativeInt = Field(default=0, description="optimiser steps; 0 = never")
    sample_prompts: tuple[str, ...] = Field(default=(), description="what is drawn on the way")
    checkpoint_every: PositiveInt = Field(default=50, description="optimiser steps")
    seed: NonNegativeInt = Field(default=0, description="of all randomness: equal seeds, equal adapters")
    pictures: PicturesSpec = Field(default=PicturesSpec(), description="a section")
    captions: CaptionsSpec = Field(default=CaptionsSpec(), description="a section")
    loss: LossSpec = Field(default=LossSpec(), description="a section")
    noise: NoiseSpec = Field(default=NoiseSpec(), description="a section")
    optimizer: OptimizerSpec = Field(default=OptimizerSpec(), description="a section")
    prior: PriorSpec = Field(default=PriorSpec(), description="a section")
    memory: MemorySpec = Field(default=MemorySpec(), description="a section")
    stop: StopSpec = Field(default=StopSpec(), description="a section")

    @model_validator(mode="before")
    @classmethod
    def _migrate(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        found = migrate(cast(Mapping[str, Any], data))
        if problem := _misplaced(found):
            raise ValueError(problem)
        return found

    @model_validator(mode="after")
    def _name_contradictions(self) -> Self:
        if problem := contradiction(self):
            raise ValueError(problem)
        return self

    def warnings(self) -> tuple[str, ...]:
        """What is allowed but seldom meant, one sentence each: to be shown before the run."""
        return tuple(doubts(self))

    def fitted(self, photos: int) -> Recipe:
        """The recipe as it runs on this many training photos: `steps` worked out from `steps_per_photo`."""
        if self.steps_per_photo is None:
            return self
        steps = min(max(round(self.steps_per_photo * photos), self.min_steps), self.max_steps)
        return self.model_copy(update={"steps": steps, "steps_per_photo": None})


# ----------------------------------------------------------------------------- versions

SECTIONS: Mapping[str, type[Noun]] = {
    "pictures": PicturesSpec,
    "captions": CaptionsSpec,
    "loss": LossSpec,
    "noise": NoiseSpec,
    "optimizer": OptimizerSpec,
    "prior": PriorSpec,
    "memory": MemorySpec,
    "stop": StopSpec,
}
"""The tables of a recipe file, by name."""


def migrate(values: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe of an older version in today's keys. Without `version`, keys of old times tell it.

    Raises ValueError for a version that is yet to come.
    """
    found = dict(values)
    sectioned = any(key in SECTIONS for key in found)
    old = any(key in found for key in MOVED_IN_2) and not sectioned
    version = found.get("version", 1 if old else VERSION)
    if isinstance(version, int) and version > VERSION:
        raise ValueError(
            f"recipe version {version} is newer than {VERSION}, the newest this livery reads: update livery"
        )
    if version == 1 and sectioned:
        raise ValueError("version 1 had no sections, this recipe has: write version = 2")
    return _from_1(found) if version == 1 else found


def _misplaced(values: Mapping[str, Any]) -> str | None:
    """A sentence on the first key that stands in the wrong table; none when there is no such key."""
    top = [key for key in values if key not in Recipe.model_fields]
    for key in top:
        places = [f"[{name}]" for name, spec in SECTIONS.items() if key in spec.model_fields]
        places += ["[[tuners]]"] if any(key in spec.model_fields for spec in SORTS) else []
        if places:
            return f"unknown key '{key}': it stands in {' or '.join(places)}"
    for section, spec in SECTIONS.items():
        inside = values.get(section)
        if not isinstance(inside, Mapping):
            continue
        for key in cast(Mapping[str, Any], inside):
            others = [f"[{name}]" for name, each in SECTIONS.items() if key in each.model_fields]
            if key not in spec.model_fields and (key in Recipe.model_fields or others):
                place = "at the top" if key in Recipe.model_fields else f"in {' or '.join(others)}"
                return f"{section}: unknown key '{key}': it stands {place}"
    return None


MOVED_IN_2: Mapping[str, tuple[str, str]] = {
    "resolution": ("pictures", "resolutions"),
    "schedule": ("optimizer", "schedule"),
    "warmup_steps": ("optimizer", "warmup_steps"),
    "weight_decay": ("optimizer", "weight_decay"),
    "clip_norm": ("optimizer", "clip_norm"),
    "caption_dropout": ("captions", "dropout"),
    "min_snr_gamma": ("loss", "min_snr_gamma"),
}
"""Keys that stood at the top in version 1 -> their section and name now."""


def _from_1(values: dict[str, Any]) -> dict[str, Any]:
    """Version 1 cut pictures to squares, ran to the end and kept the last checkpoint."""
    found: dict[str, Any] = {key: value for key, value in values.items() if key not in MOVED_IN_2}
    found["version"] = 2
    found["pictures"] = {"buckets": False}
    found["stop"] = {"keep": "last"}
    for old, (section, key) in MOVED_IN_2.items():
        value = values.get(old)
        if value is None:
            continue
        if old == "resolution":
            value = [value]
        if old == "min_snr_gamma" and not value:
            section, key, value = "loss", "weighting", "none"
        found.setdefault(section, {})[key] = value
    return found
