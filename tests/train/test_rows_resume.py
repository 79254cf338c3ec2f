"""Everything that rows vary, at once: a run that stopped and lost its cache ends in the same bytes."""

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from livery.models.sd1 import SD1
from livery.nouns import (
    CaptionsSpec,
    Dataset,
    LowRankSpec,
    Photo,
    PicturesSpec,
    PriorSpec,
    Recipe,
    Step,
    Trained,
)
from livery.train.loop import train

SHAPES = ((32, 32), (40, 32), (32, 64), (90, 30), (32, 32))
PHOTOS = tuple(
    Photo(
        sha256=f"{i:064x}",
        width=width,
        height=height,
        captions=("acme, a, b, c", f"thing {i}"),
        repeats=1 + i % 2,
        weight=1 + i / 4,
        mask=f"{i + 50:064x}" if i % 2 else None,
    )
    for i, (width, height) in enumerate(SHAPES)
)
RECIPE = Recipe(
    tuners=(LowRankSpec(rank=2),),
    steps=6,
    batch_size=3,
    accumulate=2,
    validate_every=0,
    checkpoint_every=2,
    precision="fp32",
    pictures=PicturesSpec(resolutions=(24, 32), flip=0.5, masks="loss", unmasked_weight=0.1),
    captions=CaptionsSpec(dropout=0.2, shuffle_tags=True, tag_dropout=0.3, variants=3),
    prior=PriorSpec(kind="photos", prompt="a dog", count=3),
)


def pixels(photo: Photo) -> Image.Image:
    random = np.random.default_rng(int(photo.sha256, 16))
    return Image.fromarray(random.integers(0, 256, (photo.height, photo.width, 3), np.uint8))


def draw(prompts: Sequence[str], seeds: Sequence[int]) -> Iterator[Image.Image]:
    for seed in seeds:
        yield Image.fromarray(np.random.default_rng(seed).integers(0, 256, (32, 32, 3), np.uint8))


def go_on(folder: Path, base: SD1, stop_at: int | None = None) -> tuple[list[float], str | None]:
    """The losses of the steps done now, and the hash of the adapter if the run ended."""
    losses: list[float] = []
    ended = None
    events = train(
        RECIPE,
        base,
        Dataset(name="things", photos=PHOTOS),
        pixels=pixels,
        folder=folder,
        draw=draw,
        should_stop=lambda: len(losses) == stop_at,
    )
    for event in events:
        if isinstance(event, Step):
            losses.append(event.loss)
        if isinstance(event, Trained):
            ended = event.adapter.sha256
    return losses, ended


def test_a_run_that_stopped_and_lost_its_cache_ends_in_the_same_bytes(tmp_path: Path):
    base = SD1.tiny()
    losses, whole = go_on(tmp_path / "whole", base)
    first, none = go_on(tmp_path / "cut", base, stop_at=3)
    shutil.rmtree(tmp_path / "cut" / "cache")
    second, cut = go_on(tmp_path / "cut", base)
    assert len(losses) == 6
    assert none is None
    assert first + second == losses
    assert cut == whole is not None
