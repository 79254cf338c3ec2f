"""One run, from wherever it stands to its adapter: steps, looks, checkpoints, the record."""

from __future__ import annotations

import hashlib
import io
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from livery import __version__
from livery.files import write_bytes
from livery.models.backbone import Backbone
from livery.models.device import device_name, peak_memory_bytes
from livery.models.noise import for_recipe
from livery.nouns import (
    Adapter,
    AdapterCard,
    Dataset,
    Event,
    Note,
    Recipe,
    Run,
    Sample,
    Saved,
    Step,
    Trained,
    Validation,
    with_trigger,
)
from livery.train import checkpoint
from livery.train.batches import held_out_row
from livery.train.buckets import Framing
from livery.train.cache import Encodings
from livery.train.learner import Learner
from livery.train.validation import Grid, held_out_loss
from livery.tuners.adapter_file import adapter_bytes

Draw = Callable[[Sequence[str], Sequence[int]], Iterable[Image.Image]]
"""Prompts and as many seeds -> pictures, with the tuners as they stand."""


@dataclass(frozen=True)
class Outlets:
    """Where a run puts what it makes, and who draws its samples.

    Files go into the run's folder and, when there is one, into `put_blob`, which gives their SHA-256.
    """

    folder: Path
    put_blob: Callable[[bytes], str] | None
    draw: Draw | None

    def keep(self, content: bytes, name: str) -> str:
        """Store bytes under `name` in the folder and as a blob; their SHA-256."""
        write_bytes(self.folder / name, content)
        return self.put_blob(content) if self.put_blob else hashlib.sha256(content).hexdigest()


class Session:
    """The steps done so far, and how to do the rest."""

    def __init__(
        self,
        identity: checkpoint.Identity,
        recipe: Recipe,
        backbone: Backbone,
        dataset: Dataset,
        learner: Learner,
        encodings: Encodings,
        outlets: Outlets,
    ) -> None:
        self._identity, self._recipe, self._backbone, self._dataset = identity, recipe, backbone, dataset
        self._learner, self._encodings, self._outlets = learner, encodings, outlets
        self._steps: list[Step] = []
        self._validations: list[Validation] = []
        self._samples: list[Sample] = []
        self._began, self._peak_before = time.monotonic(), 0
        self._saved: int | None = None
        self._whole = True  # false while parameters move: such a state must not be saved

    @property
    def step(self) -> int:
        """Optimiser steps taken."""
        return len(self._steps)

    def run(
        self, found: checkpoint.Progressed | None, began: float, should_stop: Callable[[], bool]
    ) -> Iterator[Event]:
        """Go on from what was found, to the end or until told to stop; `began` is a time.monotonic()."""
        self._began = began
        if found:
            self._restore(found)
            yield Note(text=f"Going on from step {self.step} of {self._recipe.steps}.")
        try:
            yield from self._events(should_stop)
        except (KeyboardInterrupt, GeneratorExit):  # the user, or whoever reads the events, has gone
            if self._whole:
                self._save()
            raise

    def _events(self, should_stop: Callable[[], bool]) -> Iterator[Event]:
        yield from self._look()
        while self.step < self._recipe.steps:
            if should_stop():
                yield self._save()
                yield Note(
                    text=f"Stopped at step {self.step} of {self._recipe.steps}; the run can go on from here."
                )
                return
            yield self._advance()
            yield from self._look()
            if self._due(self._recipe.checkpoint_every):
                yield self._save()
        yield self._finish()

    def _advance(self) -> Step:
        loss = self._learner.gradients(self.step)
        self._whole = False
        rate = self._learner.update(self.step)
        self._steps.append(Step(step=self.step + 1, loss=loss, learning_rate=rate))
        self._whole = True
        return self._steps[-1]

    def _due(self, every: int) -> bool:
        return every > 0 and (self.step % every == 0 or self.step == self._recipe.steps)

    def _look(self) -> Iterator[Event]:
        """Validate and draw where that is due and, after a resume, not done yet."""
        if self._due(self._recipe.validate_every) and not _at(self.step, self._validations):
            yield from self._validate()
        if self._due(self._recipe.sample_every) and not _at(self.step, self._samples):
            yield from self._sample()

    def _validate(self) -> Iterator[Validation]:
        recipe, framing = self._recipe, Framing.of(self._recipe, self._backbone)
        photos = self._dataset.split("validation")
        if not photos:
            return
        rows = tuple(held_out_row(photo, recipe, framing) for photo in photos)
        grid = Grid(rows, recipe.loss, recipe.precision, recipe.batch_size)
        loss = held_out_loss(self._backbone, for_recipe(self._backbone.noise, recipe), grid, self._encodings)
        self._validations.append(Validation(step=self.step, loss=loss))
        yield self._validations[-1]

    def _sample(self) -> Iterator[Sample]:
        """Draw the sample prompts with seeds 0, 1, ...: the same at every step."""
        prompts = [with_trigger(prompt, self._recipe.trigger) for prompt in self._recipe.sample_prompts]
        if not (self._outlets.draw and prompts):
            return
        images = self._outlets.draw(prompts, range(len(prompts)))
        drawn = [self._keep(prompt, image) for prompt, image in zip(prompts, images, strict=True)]
        self._samples.extend(drawn)
        yield from drawn

    def _keep(self, prompt: str, image: Image.Image) -> Sample:
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        content = buffer.getvalue()
        name = f"samples/step-{self.step:08d}-{hashlib.sha256(content).hexdigest()[:12]}.png"
        return Sample(step=self.step, prompt=prompt, sha256=self._outlets.keep(content, name))

    def _save(self) -> Saved:
        if self._saved != self.step:
            checkpoint.write(self._outlets.folder, self._journal(), self._learner.state())
            self._saved = self.step
        return Saved(step=self.step)

    def _journal(self) -> checkpoint.Journal:
        return checkpoint.Journal(
            identity=self._identity,
            steps=tuple(self._steps),
            validations=tuple(self._validations),
            samples=tuple(self._samples),
            seconds=time.monotonic() - self._began,
            peak_memory_bytes=max(self._peak_before, peak_memory_bytes(self._backbone.device)),
        )

    def _restore(self, found: checkpoint.Progressed) -> None:
        self._learner.load(found.tensors)
        journal = found.journal
        self._steps, self._validations = list(journal.steps), list(journal.validations)
        self._samples = list(journal.samples)
        self._began -= journal.seconds
        self._peak_before = journal.peak_memory_bytes
        self._saved = self.step

    def _finish(self) -> Trained:
        card = self._card()
        sha256 = self._outlets.keep(adapter_bytes(card, self._learner.adapter()), "adapter.safetensors")
        adapter = Adapter(sha256=sha256, card=card)
        record = self._journal().model_dump(exclude={"identity"})
        run = Run(
            recipe=self._recipe,
            dataset=self._identity.dataset,
            base_sha256=self._identity.base,
            adapter=adapter.id,
            device=device_name(self._backbone.device),
            **record,
        )
        return Trained(adapter=adapter, run=run)

    def _card(self) -> AdapterCard:
        photos = self._dataset.split("train")
        return AdapterCard(
            recipe=self._recipe,
            family=self._backbone.family,
            base_sha256=self._identity.base,
            dataset=self._identity.dataset,
            trigger_words=(self._recipe.trigger,) if self._recipe.trigger else (),
            licences=tuple(sorted({photo.licence for photo in photos} - {""})),
            attributions=tuple(sorted({photo.attribution for photo in photos} - {""})),
            livery_version=__version__,
            step=self.step,
        )


def _at(step: int, events: Sequence[Validation] | Sequence[Sample]) -> bool:
    return any(event.step == step for event in events)
