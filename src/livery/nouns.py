"""The nouns of livery: frozen values that every room shares. No room, no torch.

Each noun is a frozen pydantic value. An unknown key is refused with the nearest known key
named. The id of a noun is the SHA-256 of its canonical JSON, so equal content has one id.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self, cast

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    StringConstraints,
    ValidationError,
    model_validator,
)


class LiveryError(Exception):
    """Something the user can mend: one sentence that names the file, key or value and what to do."""


Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Share = Annotated[float, Field(ge=0, le=1)]
Split = Literal["train", "validation", "test"]


class Noun(BaseModel):
    """A frozen value with an id that is the hash of its content."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _name_unknown_keys(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        keys = [str(key) for key in cast(Mapping[Any, Any], data)]
        for key in keys:
            if key not in cls.model_fields:
                raise ValueError(unknown_key(key, list(cls.model_fields)))
        return cast(Any, data)

    @property
    def id(self) -> str:
        """SHA-256, hexadecimal, of the canonical JSON: sorted keys, no spaces."""
        return sha256_of(self.model_dump(mode="json"))

    @classmethod
    def parse(cls, data: Mapping[str, Any], where: str) -> Self:
        """Build from a plain mapping; `where` (a file name) leads the error. Raises LiveryError."""
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise LiveryError(f"{where}: {first_problem(error)}") from None


def sha256_of(value: Any) -> str:
    """SHA-256, hexadecimal, of a JSON value in canonical form."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def unknown_key(key: str, known: list[str]) -> str:
    """One sentence that refuses a key and names the nearest known one."""
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    hint = f"did you mean '{near[0]}'?" if near else f"known keys: {', '.join(sorted(known))}."
    return f"unknown key '{key}': {hint}"


def first_problem(error: ValidationError) -> str:
    """The first problem of a validation error, as one line with the path of its key."""
    problem = error.errors()[0]
    path = ".".join(str(part) for part in problem["loc"])
    message = problem["msg"].removeprefix("Value error, ")
    return f"{path}: {message}" if path else message


# ----------------------------------------------------------------------------- pictures


class Photo(Noun):
    """One image by content hash (of the stored PNG), with what is known of it."""

    sha256: Sha256
    width: PositiveInt
    height: PositiveInt
    captions: tuple[str, ...] = ()
    split: Split = "train"
    attributes: dict[str, str] = {}
    source: str = Field(default="", description="file name it came from")
    licence: str = Field(default="", description="SPDX id where there is one")
    attribution: str = ""
    consent: str = ""
    weight: PositiveFloat = 1.0

    @property
    def caption(self) -> str:
        """The first caption, or the empty string."""
        return self.captions[0] if self.captions else ""


class Dataset(Noun):
    """An immutable manifest of photos; each photo carries its split."""

    name: str
    photos: tuple[Photo, ...]
    background: str = Field(default="#ffffff", description="colour that transparency was laid on")
    notes: tuple[str, ...] = ()
    parent: Sha256 | None = None

    def split(self, name: Split) -> tuple[Photo, ...]:
        """The photos of one split, in the manifest's order."""
        return tuple(photo for photo in self.photos if photo.split == name)


# ----------------------------------------------------------------------------- training


class TunerSpec(Noun):
    """What a run changes: the tuner's registered kind and its settings."""

    kind: Literal["lora"] = "lora"
    rank: PositiveInt = 16
    alpha: PositiveFloat | None = Field(default=None, description="scale is alpha / rank; default rank")
    targets: str | None = Field(default=None, description="regular expression; default the family's")


class Recipe(Noun):
    """Everything one run needs, checked before any weight is read, stored whole in the adapter."""

    base: str = Field(default="starter", description="'starter', a diffusers folder, or a hub id")
    family: str | None = Field(default=None, description="default: read from the base")
    tuners: tuple[TunerSpec, ...] = (TunerSpec(),)
    trigger: str = Field(default="", description="words that call the style; put behind captions")
    resolution: PositiveInt | None = Field(default=None, description="pixels; default the base's")
    steps: PositiveInt = 400
    batch_size: PositiveInt = 8
    accumulate: PositiveInt = Field(default=1, description="batches per optimiser step")
    learning_rate: PositiveFloat = Field(default=1e-3, description="per optimiser step")
    schedule: Literal["constant", "cosine"] = "cosine"
    warmup_steps: NonNegativeInt = 20
    weight_decay: NonNegativeFloat = 0.01
    clip_norm: PositiveFloat = 1.0
    min_snr_gamma: NonNegativeFloat = Field(
        default=5.0, description="loss weight per noise level; 0 = off, as models trained to pure noise need"
    )
    caption_dropout: Share = Field(default=0.1, description="share of rows trained on no caption")
    precision: Literal["auto", "fp32", "bf16"] = Field(
        default="auto", description="auto: bf16 where the processor has it"
    )
    validate_every: NonNegativeInt = Field(default=100, description="optimiser steps; 0 = never")
    sample_every: NonNegativeInt = Field(default=0, description="optimiser steps; 0 = never")
    sample_prompts: tuple[str, ...] = ()
    checkpoint_every: PositiveInt = Field(default=50, description="optimiser steps")
    seed: NonNegativeInt = 0


class AdapterCard(Noun):
    """What an adapter file says of itself; lives in its safetensors metadata.

    It holds no time or machine, so that the same run always writes the same bytes.
    """

    recipe: Recipe
    family: str
    base_sha256: Sha256
    dataset: Sha256
    trigger_words: tuple[str, ...] = ()
    licences: tuple[str, ...] = ()
    attributions: tuple[str, ...] = ()
    livery_version: str
    step: NonNegativeInt = Field(description="optimiser steps taken")


class Adapter(Noun):
    """Trained tensors in one safetensors blob, and their card."""

    sha256: Sha256
    card: AdapterCard


def with_trigger(caption: str, trigger: str) -> str:
    """The caption with the trigger words behind it, unless they are in it already (in any case)."""
    if not trigger or trigger.casefold() in caption.casefold():
        return caption
    return f"{caption}, {trigger}" if caption else trigger


# ----------------------------------------------------------------------------- events


class Progress(Noun):
    """Work done so far in one stage; `total` is 0 when it is not known."""

    kind: Literal["progress"] = "progress"
    stage: str
    done: NonNegativeInt
    total: NonNegativeInt = 0


class Note(Noun):
    """One line the user should read; a warning also says what to do."""

    kind: Literal["note"] = "note"
    level: Literal["info", "warning"] = "info"
    text: str


class Refused(Noun):
    """One file that was not taken, and why."""

    kind: Literal["refused"] = "refused"
    file: str
    reason: str


class Step(Noun):
    """One optimiser step: the mean loss of its rows."""

    kind: Literal["step"] = "step"
    step: PositiveInt
    loss: float
    learning_rate: NonNegativeFloat


class Validation(Noun):
    """Loss over the held-out photos on a fixed grid of timesteps and noises; step 0 is untrained."""

    kind: Literal["validation"] = "validation"
    step: NonNegativeInt
    loss: float


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


class Ingested(Noun):
    """Ingest ended: the Dataset it made."""

    kind: Literal["ingested"] = "ingested"
    dataset: Dataset


class Trained(Noun):
    """Training ended: the Adapter it made and the Run it was."""

    kind: Literal["trained"] = "trained"
    adapter: Adapter
    run: Run


class Evaluated(Noun):
    """Evaluation ended: the Report it made."""

    kind: Literal["evaluated"] = "evaluated"
    report: Report


class Drawn(Noun):
    """One picture that was asked for; `sha256` is its PNG blob."""

    kind: Literal["drawn"] = "drawn"
    prompt: str
    seed: NonNegativeInt
    adapter: Sha256 | None = None
    sha256: Sha256


class Written(Noun):
    """A file or folder was written for the user to open."""

    kind: Literal["written"] = "written"
    what: str
    path: str


class Run(Noun):
    """The record of one training: its curves, its cost, and what came out."""

    recipe: Recipe
    dataset: Sha256
    base_sha256: Sha256
    adapter: Sha256 = Field(description="id of the Adapter")
    steps: tuple[Step, ...]
    validations: tuple[Validation, ...]
    samples: tuple[Sample, ...] = ()
    seconds: NonNegativeFloat
    peak_memory_bytes: NonNegativeInt
    device: str


# ----------------------------------------------------------------------------- evaluation


class Question(Noun):
    """One prompt of a suite and what its picture must show."""

    prompt: str = Field(description="without style words")
    concept: str = Field(default="", description="the label the judge must find; empty = not asked")
    reference: Sha256 | None = Field(default=None, description="blob of the designers' own picture")


class Suite(Noun):
    """What to ask: prompts with what each must show, seeds, and what the judge may answer."""

    name: str
    questions: tuple[Question, ...]
    tuning: tuple[Question, ...] = Field(
        default=(), description="other questions, on which the style prompt is chosen"
    )
    seeds: tuple[NonNegativeInt, ...] = (0, 1)
    style: str = Field(default="", description="the style label that is wanted")
    styles: tuple[str, ...] = Field(default=(), description="every style label the judge may answer")
    concepts: tuple[str, ...] = Field(default=(), description="every concept label, likewise")
    style_prompts: tuple[str, ...] = Field(
        default=(), description="templates with {prompt}; the best one is what prompting can do"
    )
    references: tuple[Sha256, ...] = Field(
        default=(), description="blobs of pictures in the wanted style, other than the answers"
    )


class Interval(Noun):
    """A mean with its 95% bootstrap interval over prompts."""

    value: float
    low: float
    high: float
    n: NonNegativeInt = Field(description="prompts")


class Score(Noun):
    """One metric on one arm."""

    metric: str
    arm: str
    interval: Interval


class Difference(Noun):
    """One metric, arm minus other, paired by prompt and seed."""

    metric: str
    arm: str
    other: str
    interval: Interval


class Picture(Noun):
    """One picture of a report; `sha256` is its PNG blob."""

    arm: str
    prompt: str
    concept: str = ""
    seed: NonNegativeInt
    sha256: Sha256
    scores: dict[str, float] = Field(default={}, description="metric -> this picture's own value")


class Match(Noun):
    """A picture of the tuned model and the training picture nearest to it, as the judge sees them."""

    sha256: Sha256
    reference: Sha256 = Field(description="blob of the training picture")
    similarity: float = Field(description="cosine")
    mirrored: bool = Field(default=False, description="the mirror image of the training picture was nearer")


class Report(Noun):
    """Scores, pictures and verdict of one adapter on one suite, always against its base."""

    title: str
    adapter: Sha256 | None
    base_sha256: Sha256
    dataset: Sha256 | None
    run: Sha256 | None = None
    suite: Sha256
    embedder: str = Field(description="name of the judge")
    embedder_sha256: Sha256
    style_prompt: str = Field(description="the template that won on the tuning questions")
    arms: tuple[str, ...]
    scores: tuple[Score, ...]
    differences: tuple[Difference, ...]
    pictures: tuple[Picture, ...]
    nearest: tuple[Match, ...] = Field(default=(), description="the most similar first, a few only")
    drawing: str = Field(default="", description="how every arm drew: sampler, steps, guidance")
    verdict: tuple[str, ...] = Field(description="plain sentences, the most important first")
    passed: bool = Field(description="tuned beats the best prompt on style and on likeness")
    seconds: NonNegativeFloat
    html: Sha256 | None = Field(default=None, description="blob of the page")


Event = Annotated[
    Progress
    | Note
    | Refused
    | Step
    | Validation
    | Sample
    | Saved
    | Ingested
    | Trained
    | Evaluated
    | Drawn
    | Written,
    Field(discriminator="kind"),
]

for _late in (Trained, Evaluated):
    _late.model_rebuild()

STORED: dict[str, type[Noun]] = {noun.__name__: noun for noun in (Dataset, Adapter, Run, Suite, Report)}
"""The nouns that the store keeps, by name."""
