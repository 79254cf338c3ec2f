"""A few steps of the run itself, to measure what an estimate works out."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median

from PIL import Image

from livery.models.backbone import Backbone
from livery.models.device import peak_memory_bytes
from livery.nouns import Dataset, Event, Photo, Recipe, Step
from livery.train.estimate import Probe
from livery.train.loop import train

WARM = 3
"""First steps that are not counted: kernels are chosen and memory is gathered."""


def probe(
    recipe: Recipe,
    backbone: Backbone,
    dataset: Dataset,
    pixels: Callable[[Photo], Image.Image],
    cache: Path,
    steps: int = 20,
) -> Iterator[Event | Probe]:
    """The run's events for `steps` warm steps without looks, samples or result; the last one is the Probe.

    What it encodes stays in `cache` for the run. On a CPU the peak is that of the process so far.
    """
    shorter = recipe.fitted(len(dataset.split("train"))).model_copy(
        update={"steps": WARM + steps, "validate_every": 0, "sample_every": 0}
    )
    shorter = shorter.model_copy(
        update={"stop": recipe.stop.model_copy(update={"check_effect_at": 0, "keep": "last"})}
    )
    times: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        for event in train(
            shorter, backbone, dataset, pixels=pixels, folder=Path(folder), cache=cache, resume=False
        ):
            if isinstance(event, Step):
                times.append(time.perf_counter())
            elif event.kind == "progress":
                yield event
    between = [after - before for before, after in zip(times[WARM - 1 :], times[WARM:], strict=False)]
    yield Probe(len(between), median(between), peak_memory_bytes(backbone.device))
