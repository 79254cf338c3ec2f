"""The training loop's frame: check, encode, attach, run, and leave the base as it was found."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path

from PIL import Image

from livery.files import write_bytes
from livery.models.backbone import Backbone
from livery.nouns import (
    Dataset,
    Event,
    LiveryError,
    MemorySpec,
    Note,
    Photo,
    Progress,
    Recipe,
    recipe_toml,
)
from livery.train import checkpoint
from livery.train.attention import Kind, attending, fastest
from livery.train.batches import Plan, held_out_row
from livery.train.buckets import Framing
from livery.train.cache import Encodings, TensorCache
from livery.train.cache_folder import CLASS
from livery.train.footprint import choose
from livery.train.learner import Learner
from livery.train.memory import applied, waiting
from livery.train.parallel import ALONE, Peers
from livery.train.prior import ClassPhotos
from livery.train.record import Draw, Outlets, Score
from livery.train.session import Session
from livery.train.validation import watched
from livery.tuners.tuner import attach_all, build

CHOICES = "choices.json"
"""What a run chose for this machine, in its folder: the memory plan, the kind of attention."""
ATTENTION = "attention.json"
"""What was measured on this machine, beside the cache."""


CUT = 0.15
"""The share of a picture that may be cut off without a word: a little above the most that buckets cut."""


def train(
    recipe: Recipe,
    backbone: Backbone,
    dataset: Dataset,
    *,
    pixels: Callable[[Photo], Image.Image],
    folder: Path,
    cache: Path | None = None,
    put_blob: Callable[[bytes], str] | None = None,
    draw: Draw | None = None,
    score: Score | None = None,
    resume: bool = True,
    should_stop: Callable[[], bool] = lambda: False,
    peers: Peers = ALONE,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Event]:
    """Train what the recipe's tuners change; the last event is Trained.

    `folder` holds the run's checkpoints, `adapter.safetensors` and the `recipe.toml` that ran; `cache`
    (default inside it) holds encodings and is best shared by all runs. `draw` makes the samples. `score`
    judges the adapter of each validation in place of the held-out loss, where the recipe keeps the best. With
    `resume`, a run goes on from its last checkpoint, and on a CPU ends in the same bytes as if it had never
    stopped; without, checkpoints in the folder are deleted. When `should_stop` answers true, or on an
    interrupt, a checkpoint is written and the run ends without Trained. The backbone is left as it was found.
    Class photos that the recipe wants and the dataset lacks are drawn by `draw` first, and kept in the cache.

    Of several processes (`peers`), each of which calls this with the same values, the first alone looks,
    draws, writes and tells Trained.

    Raises LiveryError: no photo to train on, settings that do not fit the base, a checkpoint of another
    run, a run that diverges, a tuner without effect.
    """
    began = clock()
    recipe = recipe.fitted(sum(not photo.prior for photo in dataset.split("train")))
    framing = Framing.of(recipe, backbone)
    identity = checkpoint.Identity(recipe=recipe.id, dataset=dataset.id, base=backbone.sha256)
    _require_photos(dataset)
    if peers.leads:
        checkpoint.sweep(folder)
        if not resume:
            checkpoint.clear(folder)
    peers.wait()
    found = checkpoint.latest(folder, identity, backbone.device)
    if peers.leads:
        write_bytes(folder / "recipe.toml", recipe_toml(recipe).encode())
    yield from _notes(recipe, dataset, draw)
    tuners = [build(spec) for spec in recipe.tuners]
    towers_train = any("towers" in each.touches for each in tuners)
    kept = cache or folder / "cache"
    drawn = ClassPhotos(kept / CLASS, backbone.sha256)
    peers.wait() if not peers.leads else None  # the first draws and encodes, the others find it done
    memory, kept_kind, why = _settled(recipe, backbone, dataset, folder if found or not peers.leads else None)
    if why:
        yield Note(text=why)
    if peers.leads:
        _keep(folder, memory, kept_kind)
    with waiting(backbone, memory, towers_train=towers_train) as seats:
        draw = seats.drawing(draw) if seats and draw else draw
        photos = yield from drawn.complete(dataset.split("train"), recipe.prior, draw)
        plan = Plan(photos, recipe, framing)
        yield from _cut_notes(plan, framing)
        store, read = TensorCache(kept), drawn.reading(pixels)
        encodings = Encodings(backbone, store, read, recipe.pictures, towers_train=towers_train)
        for progress in _encode(plan, dataset, framing, encodings):
            yield progress
            if peers.count == 1 and should_stop():
                yield Note(text="Stopped before the first step; what was encoded is kept.")
                return
        peers.wait() if peers.leads else None
        attached = attach_all(tuners, backbone, recipe.seed)
        try:
            with applied(backbone, memory):
                kind = kept_kind or fastest(backbone, plan, encodings, kept / ATTENTION)
                if peers.leads:
                    _keep(folder, memory, kind)
                with attending(backbone.denoiser, kind):
                    learner = Learner(recipe, backbone, attached, plan, encodings, peers, memory=memory)
                    outlets = Outlets(folder, put_blob, draw, score)
                    session = Session(identity, dataset, learner, outlets, peers, clock)
                    yield from session.run(found, began, should_stop)
        finally:
            attached.undo()


def _settled(
    recipe: Recipe, backbone: Backbone, dataset: Dataset, before: Path | None
) -> tuple[MemorySpec, Kind | None, str]:
    """The memory plan, the kind of attention where it is chosen already, and why.

    A run that goes on keeps what it chose (in the folder `before`), however much is free today: its bits hang
    on it. Of several processes the first chooses.
    """
    file = before / CHOICES if before else None
    if file and file.is_file():
        chosen = json.loads(file.read_text())
        return MemorySpec.parse(chosen["memory"], str(file)), chosen["attention"], ""
    plan, why = choose(recipe, backbone, dataset)
    return plan, None, why


def _keep(folder: Path, memory: MemorySpec, attention: Kind | None) -> None:
    chosen = {"memory": memory.model_dump(), "attention": attention}
    write_bytes(folder / CHOICES, json.dumps(chosen).encode())


def _require_photos(dataset: Dataset) -> None:
    if all(photo.prior for photo in dataset.split("train")):
        raise LiveryError(
            f"dataset '{dataset.name}' has no photo in its split 'train': add some to learn from."
        )


def _notes(recipe: Recipe, dataset: Dataset, draw: Draw | None) -> Iterator[Note]:
    """What the user should know before the first step."""
    yield from map(_warning, recipe.warnings())
    if recipe.validate_every and not dataset.split("validation"):
        yield _warning("No photo is held out, so there is no validation loss to tell learning from copying.")
    bare = sum(not (photo.caption or photo.prior) for photo in dataset.split("train"))
    if bare:
        yield _warning(f"{bare} photos to learn from have no caption: prompts will steer the result less.")
    if recipe.sample_every and not (draw and recipe.sample_prompts):
        lack = (
            "nothing to draw with was given"
            if recipe.sample_prompts
            else "the recipe names no sample_prompts"
        )
        yield _warning(f"No samples are drawn on the way: {lack}.")


def _cut_notes(plan: Plan, framing: Framing) -> Iterator[Note]:
    """A warning where pictures lose much at their edges."""
    shown = {one.photo.sha256: one for one in plan.shown() if not one.photo.prior}
    cut = [one for one in shown.values() if one.view.cut > CUT]
    if cut:
        most = max(cut, key=lambda one: one.view.cut)
        mend = "raise pictures.max_ratio" if framing.buckets else "set pictures.buckets to true"
        yield _warning(
            f"More than {CUT:.0%} is cut off {len(cut)} of {len(shown)} pictures, most off "
            f"{most.photo.source or 'one'}, {most.view.cut:.0%}: {mend} to keep them whole."
        )


def _warning(text: str) -> Note:
    return Note(level="warning", text=text)


def _encode(
    plan: Plan, dataset: Dataset, framing: Framing, encodings: Encodings
) -> Iterator[Progress | Note]:
    """Encode what the run will read: all captions, and the empty one where captions are dropped."""
    looked_at = [*chain(*watched(dataset))] if plan.recipe.validate_every else []
    rows = [held_out_row(photo, plan.recipe, framing) for photo in looked_at]
    captions = plan.captions() | {row.caption for row in rows}
    shown = [*plan.shown(), *rows]
    yield from encodings.fill(shown, captions)
    if lacking := encodings.lacking(shown, captions):
        yield _warning(
            f"The cache's limit has no room for {lacking} of this run's {len(shown) + len(captions)} "
            "encodings, which are made anew in each epoch: raise it with 'livery cache --limit'."
        )
