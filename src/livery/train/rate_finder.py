"""Finding a learning rate: a short run whose rate grows, looked at on the fixed validation grid.

Smith 2015 (arXiv:1506.01186), section 3.3, with two changes: the rate grows exponentially, and what is
judged is the loss on always the same photos, noise levels and noises, not that of each step's own rows,
which hangs more on their noise levels than on the rate.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from PIL import Image

from livery.models.backbone import Backbone
from livery.nouns import Dataset, Event, LiveryError, Note, Photo, Progress, Rates, Recipe
from livery.train.batches import Plan, held_out_row
from livery.train.buckets import Framing
from livery.train.cache import Encodings, TensorCache
from livery.train.footprint import choose
from livery.train.learner import Learner
from livery.train.memory import applied, waiting
from livery.train.validation import Grid, grid_loss, watched
from livery.tuners.tuner import attach_all, build, touched

LOWEST, HIGHEST = 1e-6, 1.0
STEPS, LOOKS = 120, 30
PHOTOS = 4
"""Photos looked at, times 8 noise levels: a sweep looks often."""
BROKEN = 4.0
"""Times the base's loss at which the sweep ends: all higher rates are worse."""
GAIN = 0.005
"""Share of the base's loss by which the best rate must be better, to count as learning."""
SAFE = 0.3
"""Part of the best rate that is suggested: a whole run takes many more steps at it than the sweep did."""


def find_rate(
    recipe: Recipe,
    backbone: Backbone,
    dataset: Dataset,
    *,
    pixels: Callable[[Photo], Image.Image],
    cache: Path,
    lowest: float = LOWEST,
    highest: float = HIGHEST,
    steps: int = STEPS,
    looks: int = LOOKS,
) -> Iterator[Event]:
    """Sweep from the lowest rate to the highest; the last event is Rates. The backbone is left as it was.

    Text encoders and tuners with rates of their own keep their share of the recipe's. Raises LiveryError for
    Prodigy, which finds its rate, for class photos, and for what training itself refuses.
    """
    _refuse(recipe)
    sweep = recipe.model_copy(update={"steps": steps, "steps_per_photo": None})
    framing, tuners = Framing.of(sweep, backbone), [build(spec) for spec in sweep.tuners]
    plan = Plan([photo for photo in dataset.split("train") if not photo.prior], sweep, framing)
    held_out, trained = watched(dataset)
    if not held_out:
        yield Note(level="warning", text="No photo is held out: rates are judged on photos to learn from.")
    photos = (held_out or trained or list(dataset.split("train")))[:PHOTOS]
    towers_train = "towers" in touched(tuners)
    memory, _ = choose(sweep, backbone, dataset)
    with waiting(backbone, memory, towers_train=towers_train):
        store = TensorCache(cache)
        encodings = Encodings(backbone, store, pixels, sweep.pictures, towers_train=towers_train)
        rows = [held_out_row(photo, sweep, framing) for photo in photos]
        yield from encodings.fill([*plan.shown(), *rows], plan.captions() | {row.caption for row in rows})
        attached = attach_all(tuners, backbone, sweep.seed)
        try:
            with applied(backbone, memory):
                growing = _growing(lowest, highest, steps)
                share = lambda step: growing(step) / sweep.learning_rate  # noqa: E731
                learner = Learner(sweep, backbone, attached, plan, encodings, share=share, memory=memory)
                grid = Grid.of(photos, sweep, framing)
                yield from _swept(learner, grid, growing, steps, max(1, steps // looks))
        finally:
            attached.undo()


def suggestion(base: float, rates: Sequence[float], losses: Sequence[float]) -> float | None:
    """A third of the rate with the lowest loss, smoothed over three looks; none when nothing was learned."""
    if not losses:
        return None
    smooth = [sum(near) / len(near) for at in range(len(losses)) if (near := losses[max(0, at - 1) : at + 2])]
    best = min(range(len(smooth)), key=smooth.__getitem__)
    return float(f"{SAFE * rates[best]:.1g}") if smooth[best] < base * (1 - GAIN) else None


def _refuse(recipe: Recipe) -> None:
    if recipe.optimizer.kind == "prodigy":
        raise LiveryError("optimizer.kind 'prodigy' finds its rate while it trains: set learning_rate to 1.")
    if recipe.prior.kind == "photos":
        raise LiveryError("a sweep draws no class photos: leave [prior] out while you look for a rate.")


def _growing(low: float, high: float, steps: int) -> Callable[[int], float]:
    """The rate of step 0, 1, ..."""
    return lambda step: low * (high / low) ** (step / max(1, steps - 1))


def _swept(
    learner: Learner, grid: Grid, growing: Callable[[int], float], steps: int, every: int
) -> Iterator[Event]:
    def look() -> float:
        with learner.looking():
            return grid_loss(learner.backbone, learner.law, grid, learner.encodings)

    base = look()
    rates: list[float] = []
    losses: list[float] = []
    for step in range(steps):
        outcome = learner.step(step)
        yield Progress(stage="try rates", done=step + 1, total=steps)
        if not math.isfinite(outcome.loss + outcome.gradient):
            break
        if (step + 1) % every == 0:
            loss = look()
            if not math.isfinite(loss) or loss > BROKEN * base:
                break
            rates.append(growing(step))
            losses.append(loss)
    yield Rates(
        base=base, rates=tuple(rates), losses=tuple(losses), suggested=suggestion(base, rates, losses)
    )


# ---------------------------------------------------------------------------- the plot

WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 640, 320, 70, 50, 20


def chart(found: Rates) -> str:
    """The curve as an SVG picture: rates on a logarithmic axis, the base and the suggestion marked."""
    low, high = math.log10(LOWEST), math.log10(HIGHEST)
    if found.rates:
        low, high = math.floor(math.log10(found.rates[0])), math.ceil(math.log10(found.rates[-1]))
    most, least = max((found.base, *found.losses)), min((found.base, *found.losses))
    most = min(most, found.base + 2 * (found.base - least)) or most  # what rises above is cut off

    def across(rate: float) -> float:
        return LEFT + (math.log10(rate) - low) / max(1, high - low) * (WIDTH - LEFT - 20)

    def down(loss: float) -> float:
        return TOP + (most - min(loss, most)) / ((most - least) or 1) * (HEIGHT - TOP - BOTTOM)

    points = " ".join(
        f"{across(rate):.1f},{down(loss):.1f}" for rate, loss in zip(found.rates, found.losses, strict=True)
    )
    floor = HEIGHT - BOTTOM
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        'font-family="sans-serif" font-size="12" aria-label="Loss at growing learning rates">'
    )
    parts = [
        head,
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>',
        f'<path d="M{LEFT},{TOP}V{floor}H{WIDTH - 20}" fill="none" stroke="#888"/>',
        f'<path d="M{LEFT},{down(found.base):.1f}H{WIDTH - 20}" stroke="#888" stroke-dasharray="4 4"/>',
        _text(LEFT - 6, down(found.base) + 4, f"base {found.base:.3g}", "end"),
        _text(LEFT - 6, floor, f"{least:.3g}", "end"),
        *(
            _text(across(10.0**power), floor + 18, f"1e{power}", "middle")
            for power in range(int(low), int(high) + 1)
        ),
        _text((LEFT + WIDTH) / 2, HEIGHT - 8, "learning rate", "middle"),
        f'<polyline points="{points}" fill="none" stroke="#2458d3" stroke-width="2"/>',
    ]
    if found.suggested:
        place = across(max(found.suggested, 10.0**low))
        parts.append(f'<path d="M{place:.1f},{TOP}V{floor}" stroke="#d3242f"/>')
        parts.append(_text(place + 5, TOP + 12, f"suggested {found.suggested:g}", "start"))
    return "".join([*parts, "</svg>"])


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="#333">{text}</text>'
