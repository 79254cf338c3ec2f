"""One run, from wherever it stands to its adapter: steps, looks, checkpoints, the record."""

from __future__ import annotations

import hashlib
import io
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from livery.files import write_bytes
from livery.models.device import device_name, peak_memory_bytes, resolve
from livery.nouns import (
    Adapter,
    AdapterCard,
    Dataset,
    Event,
    LiveryError,
    Note,
    Run,
    Sample,
    Saved,
    Step,
    Trained,
    Validation,
    with_trigger,
)
from livery.train import checkpoint, effect, guard
from livery.train.buckets import Framing
from livery.train.learner import Learner
from livery.train.parallel import ALONE, Peers
from livery.train.record import Outlets, card, why
from livery.train.validation import Grid, best, better, grid_loss, waited, watched
from livery.tuners.adapter_file import adapter_bytes

ASK_EVERY = 10
"""Steps between two questions of several processes whether to go on."""


class Session:
    """The steps done so far, and how to do the rest."""

    def __init__(
        self,
        identity: checkpoint.Identity,
        dataset: Dataset,
        learner: Learner,
        outlets: Outlets,
        peers: Peers = ALONE,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Only the leading one of several `peers` looks, draws and writes. `clock` tells seconds."""
        self._identity, self._dataset, self._learner = identity, dataset, learner
        self._recipe, self._backbone = learner.recipe, learner.backbone
        self._outlets, self._peers, self._clock = outlets, peers, clock
        self._steps: list[Step] = []
        self._validations: list[Validation] = []
        self._samples: list[Sample] = []
        self._beginning = effect.beginning(learner.params)
        self._pace = guard.Pace(clock, self._backbone.device.type)
        self._began, self._peak_before = clock(), 0
        self._saved: int | None = None
        self._whole = True  # false while parameters move: such a state must not be saved

    @property
    def step(self) -> int:
        """Optimiser steps taken."""
        return len(self._steps)

    def run(
        self, found: checkpoint.Progressed | None, began: float, should_stop: Callable[[], bool]
    ) -> Iterator[Event]:
        """Go on from what was found, to the end or until told to stop; `began` is the clock's time.

        Raises LiveryError when the run diverges or has no effect; the folder then holds the last good
        checkpoint.
        """
        self._began = began
        if found:
            self._restore(found)
            yield Note(text=f"Going on from step {self.step} of {self._recipe.steps}.")
        try:
            yield from self._events(should_stop)
        except (KeyboardInterrupt, GeneratorExit):  # the user, or whoever reads the events, has gone
            if self._whole and self._peers.leads:
                self._write()
            raise

    def _events(self, should_stop: Callable[[], bool]) -> Iterator[Event]:
        yield from self._look()
        while not self._over():
            if self._asked(should_stop):
                yield from self._save()
                yield Note(
                    text=f"Stopped at step {self.step} of {self._recipe.steps}; the run can go on from here."
                )
                return
            yield from self._advance()
            yield from self._look()
            if self._due(self._recipe.checkpoint_every) and not guard.suspect(self._losses(), self._recipe):
                yield from self._save()
        if self._peers.leads:
            yield from self._finish()

    # ------------------------------------------------------------------------- steps

    def _advance(self) -> Iterator[Event]:
        self._pace.start()
        self._whole = False
        outcome = self._learner.step(self.step)
        losses = [*self._losses(), outcome.loss]
        problem = guard.trouble(self.step + 1, losses, outcome.gradient, self._recipe)
        if problem:
            self._give_up(*problem)
        self._steps.append(Step(step=self.step + 1, loss=outcome.loss, learning_rate=outcome.rate))
        self._whole = True
        slow = self._pace.stop()
        yield self._steps[-1]
        if slow:
            yield Note(level="warning", text=slow)
        if self.step == min(self._recipe.stop.check_effect_at, self._recipe.steps):
            yield self._check_effect()

    def _losses(self) -> list[float]:
        return [step.loss for step in self._steps[-guard.LOOKS_BACK :]]

    def _check_effect(self) -> Note:
        found = effect.measure(self._learner, self._beginning)
        effect.require(found, self.step)
        return Note(
            text=f"After {self.step} steps the tuned model's answers differ from the base's by "
            f"{found.changed:.2%} of their size."
        )

    def _give_up(self, good: int, what: str) -> None:
        """End a run that went wrong after step `good`. Checkpoints of later steps are removed."""
        if self._peers.leads:
            checkpoint.forget_after(self._outlets.folder, good)
        kept = checkpoint.steps(self._outlets.folder)
        where = (
            f"The run is back at its checkpoint of step {max(kept)}." if kept else "No checkpoint was kept."
        )
        precision = resolve(self._recipe.precision, self._backbone.device)
        raise LiveryError(f"{what}: {guard.advice(self._recipe, precision)}. {where}")

    def _asked(self, should_stop: Callable[[], bool]) -> bool:
        """Whether to stop. Several processes agree on it now and then only, as asking makes all wait."""
        if self._peers.count > 1 and self.step % ASK_EVERY:
            return False
        return self._peers.agree(should_stop())

    def _over(self) -> bool:
        if self.step >= self._recipe.steps:
            return True
        patience = self._recipe.stop.patience
        if not (patience and self._due(self._recipe.validate_every)):
            return False
        return self._peers.agree(waited(self._validations, self._recipe.stop) >= patience)

    def _due(self, every: int) -> bool:
        return every > 0 and (self.step % every == 0 or self.step == self._recipe.steps)

    # ------------------------------------------------------------------------- looks

    def _look(self) -> Iterator[Event]:
        """Validate and draw where that is due and, after a resume, not done yet."""
        if not self._peers.leads:
            return
        if self._due(self._recipe.validate_every) and not _at(self.step, self._validations):
            yield from self._validate()
        if self._due(self._recipe.sample_every) and not _at(self.step, self._samples):
            yield from self._sample()

    def _validate(self) -> Iterator[Validation]:
        held_out, trained = watched(self._dataset)
        if not held_out:
            return
        learner, framing = self._learner, Framing.of(self._recipe, self._backbone)
        with learner.looking():
            loss, train = (
                grid_loss(
                    self._backbone, learner.law, Grid.of(photos, self._recipe, framing), learner.encodings
                )
                for photos in (held_out, trained)
            )
        found = Validation(step=self.step, loss=loss, train=train)
        self._validations.append(self._judged(found) if self.step else found)
        yield self._validations[-1]

    def _judged(self, found: Validation) -> Validation:
        """With its score, where there is a judge; its adapter is kept when it is the best so far."""
        if self._recipe.stop.keep == "last":
            return found
        path, before = self._best_file(self.step), best(self._validations, self._recipe.stop)
        if self._outlets.score:
            write_bytes(path, self._adapter())
            found = found.model_copy(update={"score": self._outlets.score(path)})
        if before is None or better(found, before, self._recipe.stop):
            write_bytes(path, self._adapter())
        else:
            path.unlink(missing_ok=True)
        return found

    def _sample(self) -> Iterator[Sample]:
        """Draw the sample prompts with seeds 0, 1, ...: the same at every step."""
        prompts = [with_trigger(prompt, self._recipe.trigger) for prompt in self._recipe.sample_prompts]
        if not (self._outlets.draw and prompts):
            return
        with self._learner.looking():
            images = list(self._outlets.draw(prompts, range(len(prompts))))
        if self.step and guard.blank(images):
            self._give_up(self.step - 1, f"all {len(images)} samples of step {self.step} are blank")
        drawn = [self._keep(prompt, image) for prompt, image in zip(prompts, images, strict=True)]
        self._samples.extend(drawn)
        yield from drawn

    def _keep(self, prompt: str, image: Image.Image) -> Sample:
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        content = buffer.getvalue()
        name = f"samples/step-{self.step:08d}-{hashlib.sha256(content).hexdigest()[:12]}.png"
        return Sample(step=self.step, prompt=prompt, sha256=self._outlets.keep(content, name))

    # ------------------------------------------------------------------------- checkpoints

    def _save(self) -> Iterator[Saved]:
        if self._peers.leads:
            self._write()
            yield Saved(step=self.step)

    def _write(self) -> None:
        """A checkpoint, if there is none of this step; adapters that no checkpoint needs any more go."""
        if self._saved == self.step:
            return
        state, folder = self._learner.state(), self._outlets.folder
        broken = next((name for name, part in state.items() if _broken(name, part)), None)
        if broken:
            self._give_up(self.step - 1, f"{broken} holds numbers that are not finite at step {self.step}")
        chosen = self._chosen()
        files = [self._best_file(chosen.step)] if chosen else []
        checkpoint.write(folder, self._journal(), state, files)
        for path in folder.glob("best-*.safetensors"):
            if path.name not in checkpoint.needed(folder):
                path.unlink()
        self._saved = self.step

    def _journal(self) -> checkpoint.Journal:
        return checkpoint.Journal(
            identity=self._identity,
            steps=tuple(self._steps),
            validations=tuple(self._validations),
            samples=tuple(self._samples),
            seconds=self._clock() - self._began,
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

    # ------------------------------------------------------------------------- the end

    def _chosen(self) -> Validation | None:
        """The look whose adapter the run ends with; none = the last step's."""
        return best(self._validations, self._recipe.stop) if self._recipe.stop.keep == "best" else None

    def _best_file(self, step: int) -> Path:
        return self._outlets.folder / f"best-{step:08d}.safetensors"

    def _adapter(self) -> bytes:
        return adapter_bytes(self._card(self.step), self._learner.adapter())

    def _finish(self) -> Iterator[Event]:
        chosen = self._chosen()
        step = chosen.step if chosen else self.step
        content = self._best_file(step).read_bytes() if step != self.step else self._adapter()
        ended = why(self._recipe, self._validations, chosen, self.step)
        yield Note(text=ended)
        sha256 = self._outlets.keep(content, "adapter.safetensors")
        adapter = Adapter(sha256=sha256, card=self._card(step))
        record = self._journal().model_dump(exclude={"identity"})
        run = Run(
            recipe=self._recipe,
            dataset=self._identity.dataset,
            base_sha256=self._identity.base,
            adapter=adapter.id,
            chosen_step=step,
            ended=ended,
            device=device_name(self._backbone.device),
            **record,
        )
        yield Trained(adapter=adapter, run=run)

    def _card(self, step: int) -> AdapterCard:
        return card(self._recipe, self._backbone, self._identity, self._dataset, step)


def _at(step: int, events: Sequence[Validation] | Sequence[Sample]) -> bool:
    return any(event.step == step for event in events)


def _broken(name: str, part: Tensor) -> bool:
    """Settings of the optimiser may be infinite (Prodigy's growth is unbounded); nothing else may."""
    return not name.startswith("optimizer/group/") and not bool(torch.isfinite(part).all())
