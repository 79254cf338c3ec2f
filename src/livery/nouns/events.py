"""What long work tells while it runs: one small value per thing that happened."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt

from livery.nouns.base import Noun, Sha256
from livery.nouns.evaluation import Report
from livery.nouns.pictures import Dataset
from livery.nouns.training import Adapter, Run, Sample, Saved, Step, Validation


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
