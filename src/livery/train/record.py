"""What a run leaves behind: files, the adapter's card, and the sentence on how it ended."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from livery import __version__
from livery.files import write_bytes
from livery.models.backbone import Backbone
from livery.nouns import AdapterCard, Dataset, Recipe, Validation
from livery.train.checkpoint import Identity
from livery.train.validation import change

Draw = Callable[[Sequence[str], Sequence[int]], Iterable[Image.Image]]
"""Prompts and as many seeds -> pictures, with the tuners as they stand."""
Score = Callable[[Path], float]
"""An adapter's file -> how good it is; higher is better. Decides in place of the held-out loss."""


@dataclass(frozen=True)
class Outlets:
    """Where a run puts what it makes, who draws its samples, and who judges its adapters.

    Files go into the run's folder and, when there is one, into `put_blob`, which gives their SHA-256.
    """

    folder: Path
    put_blob: Callable[[bytes], str] | None = None
    draw: Draw | None = None
    score: Score | None = None

    def keep(self, content: bytes, name: str) -> str:
        """Store bytes under `name` in the folder and as a blob; their SHA-256."""
        write_bytes(self.folder / name, content)
        return self.put_blob(content) if self.put_blob else hashlib.sha256(content).hexdigest()


def card(recipe: Recipe, backbone: Backbone, identity: Identity, dataset: Dataset, step: int) -> AdapterCard:
    """What the adapter of a step says of itself."""
    photos = dataset.split("train")
    return AdapterCard(
        recipe=recipe,
        family=backbone.family,
        base_sha256=identity.base,
        dataset=identity.dataset,
        trigger_words=(recipe.trigger,) if recipe.trigger else (),
        licences=tuple(sorted({photo.licence for photo in photos} - {""})),
        attributions=tuple(sorted({photo.attribution for photo in photos} - {""})),
        livery_version=__version__,
        step=step,
    )


def why(recipe: Recipe, validations: Sequence[Validation], chosen: Validation | None, steps: int) -> str:
    """Why a run ended after so many steps and which one it ends with: one sentence."""
    end = (
        f"Stopped at step {steps} of {recipe.steps}, as {recipe.stop.patience} looks brought nothing better"
        if steps < recipe.steps
        else f"Ran all {steps} steps"
    )
    if chosen is None:
        return f"{end}; kept the last."
    judged = f"its score {chosen.score:.3g}" if chosen.score is not None else "the lowest held-out loss"
    return f"{end}; kept step {chosen.step}, which has {judged}{_against_base(validations, chosen)}."


def _against_base(validations: Sequence[Validation], chosen: Validation) -> str:
    """Loss there against the base's, held out and on photos that were learned from."""
    found = change(validations, chosen)
    if not found:
        return ""
    held_out, trained = found
    seen = f", and {trained - 1:+.0%} on photos it learned from" if trained is not None else ""
    return f" ({held_out - 1:+.0%} against the base{seen})"
