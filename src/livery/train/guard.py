"""What stops a run that goes wrong, with the likely cause and the change to try; and what only warns."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import median

from PIL import Image

from livery.nouns import Recipe

WINDOW = 100
"""Steps whose median a loss is held against."""
ENOUGH = 10
"""Steps before a median means something."""
IN_A_ROW = 3
"""Losses that must all be too high: one row of bad luck is not an explosion."""
LOOKS_BACK = WINDOW + IN_A_ROW
"""Losses that `trouble` reads at most."""
FLAT = 2
"""A picture whose channels each span at most so many of 255 levels shows nothing."""
SLOW = 5.0
"""Times the median that a step must take to count as slow."""


def trouble(step: int, losses: Sequence[float], gradient: float, recipe: Recipe) -> tuple[int, str] | None:
    """What is wrong with a step, and after which step all was still well; none when it is fine.

    `losses` are those of the last steps, this one's included; `gradient` is the length of its gradient.
    """
    for what, value in (("loss", losses[-1]), ("gradient", gradient)):
        if not math.isfinite(value):
            return step - 1, f"the {what} became {value} at step {step}"
    usual = _usual(losses)
    if usual and min(losses[-IN_A_ROW:]) > recipe.stop.explode * usual:
        return step - IN_A_ROW, (
            f"the loss exploded after step {step - IN_A_ROW}: it is {losses[-1]:.3g}, more than "
            f"{recipe.stop.explode:g} times the {usual:.3g} of the steps before"
        )
    return None


def suspect(losses: Sequence[float], recipe: Recipe) -> bool:
    """Whether the last loss may be the first of an explosion: not a state to save as a good one."""
    usual = _usual(losses)
    return bool(usual) and losses[-1] > recipe.stop.explode * usual


def _usual(losses: Sequence[float]) -> float:
    """The median before the last steps; 0 when there are too few to tell."""
    before = losses[-LOOKS_BACK:-IN_A_ROW]
    return median(before) if len(before) >= ENOUGH else 0.0


def advice(recipe: Recipe, precision: str) -> str:
    """The likely cause and the change to try; `precision` is the arithmetic at work."""
    if precision == "fp16":
        return "fp16 overflows easily: set precision to 'bf16' or 'fp32'"
    if recipe.optimizer.kind == "prodigy":
        return "the rate that Prodigy found is too high: lower learning_rate to 0.5 or optimizer.clip_norm"
    slower = float(f"{recipe.learning_rate / 3:.1g}")
    warm_up = max(20, 2 * recipe.optimizer.warmup_steps)
    return (
        f"learning_rate is most likely too high: lower it from {recipe.learning_rate:g} to {slower:g}, or "
        f"raise optimizer.warmup_steps to {warm_up}"
    )


def blank(images: Sequence[Image.Image]) -> bool:
    """Whether there are pictures and every one is of a single colour, as broken weights draw them."""
    return bool(images) and all(_flat(image) for image in images)


def _flat(image: Image.Image) -> bool:
    spans = [image.convert("RGB").getchannel(channel).getextrema() for channel in "RGB"]
    return all(int(high) - int(low) <= FLAT for low, high in spans)  # pyright: ignore[reportArgumentType]


class Pace:
    """Watches how long steps take. `clock` tells seconds; `device` is torch's type of where they run."""

    def __init__(self, clock: Callable[[], float], device: str = "cuda") -> None:
        self._clock, self._device = clock, device
        self._seconds: list[float] = []
        self._started = 0.0
        self._warned = False

    def start(self) -> None:
        self._started = self._clock()

    def stop(self) -> str | None:
        """A sentence, once, when the last steps took many times as long as the run's usual ones."""
        self._seconds.append(self._clock() - self._started)
        late, usual = self._seconds[-IN_A_ROW:], self._seconds[-WINDOW - IN_A_ROW : -IN_A_ROW]
        if self._warned or len(usual) < ENOUGH or min(late) < SLOW * median(usual):
            return None
        self._warned = True
        cause = (
            "other programs want the processor, or memory is swapped to disk: close some of them"
            if self._device == "cpu"
            else "memory runs over into the host's: close other programs on this device, set "
            "memory.checkpointing, or lower batch_size"
        )
        return (
            f"Steps suddenly take {median(late) / median(usual):.0f} times as long as before "
            f"({median(late):.2g} s, not {median(usual):.2g} s). Most likely {cause}."
        )
