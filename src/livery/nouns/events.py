"""What long work tells while it runs: one small value per thing that happened."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt

from livery.nouns.base import Noun, Sha256, Share
from livery.nouns.evaluation import Report
from livery.nouns.pictures import Dataset
from livery.nouns.training import Adapter, Estimate, Run, Sample, Saved, Step, Validation


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


class Ingested(Noun):
    """Ingest ended: the Dataset it made."""

    kind: Literal["ingested"] = "ingested"
    dataset: Dataset


class Estimated(Noun):
    """What a run will take was worked out."""

    kind: Literal["estimated"] = "estimated"
    estimate: Estimate


class Rates(Noun):
    """Learning rates were tried: the loss on a fixed grid after each, while the rate grew."""

    kind: Literal["rates"] = "rates"
    base: float = Field(description="loss before the first step")
    rates: tuple[float, ...]
    losses: tuple[float, ...]
    suggested: float | None = Field(description="none when no rate brought the loss down")


class Trained(Noun):
    """Training ended: the Adapter it made and the Run it was."""

    kind: Literal["trained"] = "trained"
    adapter: Adapter
    run: Run


class Made(Noun):
    """An adapter came about without training: imported, merged, extracted or resized."""

    kind: Literal["made"] = "made"
    adapter: Adapter


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


class Reduced(Noun):
    """A change was brought to a lower rank: how much of it is left, as a share of its squared size."""

    kind: Literal["reduced"] = "reduced"
    rank: NonNegativeInt
    kept: Share = Field(description="of everything that was to be kept")
    layers: dict[str, float] = Field(default={}, description="layer -> share kept there")
    left_out: tuple[str, ...] = Field(default=(), description="parameters that a LoRA cannot hold")


class Checked(Noun):
    """A written file was read back and compared, layer by layer, with what it was made from."""

    kind: Literal["checked"] = "checked"
    path: str
    format: str
    matched: NonNegativeInt = Field(description="tensors that found their place when read back")
    unmatched: tuple[str, ...] = ()
    difference: NonNegativeFloat = Field(description="largest absolute difference of the change of a weight")
    largest: NonNegativeFloat = Field(description="largest absolute change of a weight")


class Written(Noun):
    """A file or folder was written for the user to open."""

    kind: Literal["written"] = "written"
    what: str
    path: str


Event = Annotated[
    Progress
    | Note
    | Refused
    | Step
    | Validation
    | Sample
    | Saved
    | Ingested
    | Estimated
    | Rates
    | Trained
    | Made
    | Evaluated
    | Drawn
    | Reduced
    | Checked
    | Written,
    Field(discriminator="kind"),
]
