"""Numbers to the geometry of the page's drawings. All positions are percentages of the drawing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from livery.nouns import Interval, Run


@dataclass(frozen=True)
class Bar:
    """One arm's mean and interval on a shared axis, in percent of its width."""

    arm: str
    title: str
    value: float
    low: float
    high: float
    text: str


@dataclass(frozen=True)
class Axis:
    """An axis from `low` to `high` with a few round ticks."""

    low: float
    high: float
    ticks: tuple[float, ...]

    @classmethod
    def around(cls, values: Sequence[float], wanted: int = 4) -> Axis:
        """The smallest axis of round ticks that holds all values."""
        low, high = min(values), max(values)
        spread = high - low if high - low > 1e-6 else max(abs(high), 1e-3)
        step = round_step(spread / wanted)
        first, last = math.floor(low / step), math.ceil(high / step)
        last += first == last
        ticks = tuple(round(n * step, 10) for n in range(first, last + 1))
        return cls(ticks[0], ticks[-1], ticks)

    def place(self, value: float) -> float:
        return round(100 * (value - self.low) / (self.high - self.low), 2)


SHARE_AXIS = Axis(0, 1, (0, 0.25, 0.5, 0.75, 1))


@dataclass(frozen=True)
class Curves:
    """Loss against step: train (smoothed), and held-out with its points. y grows downwards, as in SVG."""

    train: str
    held_out: str
    points: tuple[tuple[float, float], ...]
    y_ticks: tuple[tuple[float, str], ...]
    x_ticks: tuple[tuple[float, str], ...]


def bar(axis: Axis, arm: str, title: str, interval: Interval, text: str) -> Bar:
    value, low, high = (axis.place(end) for end in (interval.value, interval.low, interval.high))
    return Bar(arm, title, value, low, high, text)


def curves(run: Run) -> Curves | None:
    """The two loss curves, or none where nothing was recorded."""
    train = smoothed([step.loss for step in run.steps])
    values = [*train, *(check.loss for check in run.validations)]
    if not values:
        return None
    last = max([step.step for step in run.steps] + [check.step for check in run.validations])
    x, y = Axis(0, max(last, 1), ()), Axis.around(values)
    steps = [(x.place(s.step), 100 - y.place(v)) for s, v in zip(run.steps, train, strict=True)]
    checks = [(x.place(check.step), 100 - y.place(check.loss)) for check in run.validations]
    decimals = max(2, -math.floor(math.log10(y.ticks[1] - y.ticks[0])))
    return Curves(
        train=_path(thinned(steps)),
        held_out=_path(checks),
        points=tuple(checks),
        y_ticks=tuple((100 - y.place(tick), f"{tick:.{decimals}f}") for tick in y.ticks),
        x_ticks=tuple((x.place(n), f"{n:,}") for n in sorted({0, round(last / 2), last})),
    )


def smoothed(losses: Sequence[float], window: int | None = None) -> list[float]:
    """Mean over a centred window (by default a tenth of the run), cut at the ends."""
    half = (window or max(1, len(losses) // 10)) // 2
    parts = (losses[max(0, n - half) : n + half + 1] for n in range(len(losses)))
    return [sum(part) / len(part) for part in parts]


def thinned(points: Sequence[tuple[float, float]], most: int = 240) -> list[tuple[float, float]]:
    """At most about `most` points, the last one kept: more would only make the page heavy."""
    stride = max(1, math.ceil(len(points) / most))
    kept = list(points[::stride])
    return kept if not points or kept[-1] == points[-1] else [*kept, points[-1]]


def round_step(rough: float) -> float:
    """The next larger of 1, 2, 2.5, 5 and 10 times a power of ten."""
    power = 10 ** math.floor(math.log10(rough))
    return next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)


def _path(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:g},{y:.2f}" for x, y in points)
