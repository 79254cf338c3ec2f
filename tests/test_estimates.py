"""Estimates through Studio: said, kept, compared with the run that followed; limits refuse before it."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from livery.models.sd1 import SD1
from livery.nouns import (
    Estimate,
    Estimated,
    Ingested,
    LiveryError,
    MemorySpec,
    Note,
    Recipe,
    StopSpec,
    Trained,
)
from livery.store import Store
from livery.studio import Studio


def pictures(folder: Path) -> Path:
    rng = np.random.default_rng(0)
    (folder / "train").mkdir(parents=True)
    for number in range(3):
        pixels = rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "train" / f"{number}.png")
    return folder


def test_what_was_estimated_is_kept_and_compared_and_corrects_the_next(tmp_path: Path):
    SD1.tiny().save(tmp_path / "base")
    studio = Studio(Store(tmp_path / "work"), device="cpu")
    *_, ingested = studio.ingest(pictures(tmp_path / "photos"))
    assert isinstance(ingested, Ingested)
    data = ingested.dataset.id
    recipe = Recipe(
        base=str(tmp_path / "base"),
        steps=2,
        batch_size=1,
        precision="fp32",
        validate_every=0,
        stop=StopSpec(check_effect_at=0, keep="last"),
        memory=MemorySpec(mode="manual", weights="bf16"),
    )
    with pytest.raises(LiveryError, match="--max-hours allows"):
        list(studio.train(recipe, data, max_hours=1e-9))
    with pytest.raises(LiveryError, match="needs a price"):
        list(studio.train(recipe, data, max_cost=1.0))
    [kept] = {one.recipe for one in studio.store.list(Estimate)}
    assert kept == recipe.id
    loaded = studio._backbone(recipe.base)  # pyright: ignore[reportPrivateUsage]
    sha256 = loaded.sha256
    events = list(studio.train(recipe, data, max_hours=10))
    assert any(isinstance(event, Trained) for event in events)
    notes = [event.text for event in events if isinstance(event, Note)]
    assert any(note.startswith("Estimated ") for note in notes)
    assert loaded.sha256 != sha256, "its weights are rounded now"
    again = studio._backbone(recipe.base)  # pyright: ignore[reportPrivateUsage]
    assert again is not loaded
    assert again.sha256 == sha256
    *_, last = studio.estimate(recipe, data)
    assert isinstance(last, Estimated)
    assert last.estimate.earlier_runs == 1
