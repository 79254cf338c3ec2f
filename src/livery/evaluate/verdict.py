"""What the numbers say, in plain sentences, and whether it passed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from livery.nouns import Difference, Interval, Score, Suite

SHARES = {"style", "concept", "too_near"}
"""Metrics that are shares of pictures; the others are cosines."""

EXPECTED = 0.01
"""Share of pictures beyond the yardstick of copying when nothing is copied: it is a 99% quantile."""

REACHED = 0.5
"""Share in the house style from which prompting can be said to do."""


@dataclass(frozen=True)
class Table:
    """Scores and differences, looked up by name."""

    scores: Sequence[Score]
    differences: Sequence[Difference]

    def score(self, metric: str, arm: str) -> Interval | None:
        found = (s.interval for s in self.scores if (s.metric, s.arm) == (metric, arm))
        return next(found, None)

    def difference(self, metric: str, arm: str, other: str) -> Interval | None:
        rows = (d for d in self.differences if (d.metric, d.arm, d.other) == (metric, arm, other))
        return next((row.interval for row in rows), None)

    def rival(self) -> str:
        """What the tuned model has to beat: the best prompt, or the base where no prompt was tried."""
        return "prompted" if any(s.arm == "prompted" for s in self.scores) else "base"

    def decisive(self) -> list[str]:
        """The metrics that decide: style and likeness, with nearness where one of them cannot be asked."""
        there = {s.metric for s in self.scores if s.arm == "tuned"}
        style = "style" if "style" in there else "nearness"
        like = "likeness" if "likeness" in there else "nearness"
        return [metric for metric in dict.fromkeys((style, like)) if metric in there]

    def gains(self) -> list[Interval]:
        """Tuned minus rival on each metric that decides."""
        found = [self.difference(metric, "tuned", self.rival()) for metric in self.decisive()]
        return [gain for gain in found if gain is not None]

    def passed(self) -> bool:
        """The whole interval of each gain that decides lies above 0."""
        return bool(self.gains()) and all(gain.low > 0 for gain in self.gains())


def verdict(table: Table, suite: Suite) -> tuple[str, ...]:
    """Plain sentences, the most important first."""
    if table.score("concept", "tuned") is None and not table.decisive():
        return ("No adapter was judged here: these are the scores that prompting alone reaches.",)
    lines = [
        _headline(table, suite),
        _likeness(table),
        _concept(table, suite),
        _copying(table),
        _prompting(table, suite),
    ]
    return tuple(line for line in lines if line)


def share(interval: Interval) -> str:
    """`93% (88–97%)`."""
    return f"{percent(interval.value)}% ({percent(interval.low)}–{percent(interval.high)}%)"


def points(interval: Interval) -> str:
    """A difference of shares: `+81 points (74 to 88)`."""
    low, high = percent(interval.low), percent(interval.high)
    return f"{signed(percent(interval.value))} points ({minus(low)} to {minus(high)})"


def cosine(interval: Interval) -> str:
    """`0.71 (0.69–0.73)`."""
    return (
        f"{minus(f'{interval.value:.2f}')} ({minus(f'{interval.low:.2f}')}–{minus(f'{interval.high:.2f}')})"
    )


def change(interval: Interval) -> str:
    """A difference of cosines: `+0.13 (0.10 to 0.16)`."""
    low, high = minus(f"{interval.low:.2f}"), minus(f"{interval.high:.2f}")
    return f"{'+' if interval.value > 0 else ''}{minus(f'{interval.value:.2f}')} ({low} to {high})"


def percent(value: float) -> int:
    """A share as a whole percentage; what is not all and not none is never called so."""
    if 0 < abs(value) < 1:
        return int(min(max(round(abs(value) * 100), 1), 99) * (1 if value > 0 else -1))
    return round(value * 100)


def signed(value: int) -> str:
    return f"+{value}" if value > 0 else minus(value)


def minus(value: int | str) -> str:
    """With a true minus sign; never `-0.00`."""
    text = str(value)
    return text.lstrip("-") if not float(text) else text.replace("-", "−")


def _rival_name(table: Table, suite: Suite) -> str:
    if table.rival() == "base":
        return "the base model"
    count = len(suite.style_prompts)
    return f"the best of {count} prompts on the base model" if count > 1 else "the prompted base model"


def _headline(table: Table, suite: Suite) -> str:
    opening = "It works" if table.passed() else "It does not pass"
    tuned, rival = table.score("style", "tuned"), table.score("style", table.rival())
    who = _rival_name(table, suite)
    if tuned and rival:
        return (
            f"{opening}: the tuned model draws in the house style in {share(tuned)} of its pictures, "
            f"{who} in {share(rival)}."
        )
    near = table.difference("nearness", "tuned", table.rival())
    if near is None:
        return f"{opening}: this suite names no style and no reference pictures, so style was not measured."
    return f"{opening}: the tuned model lies nearer to the house style than {who} by {change(near)}."


def _likeness(table: Table) -> str:
    tuned, rival = table.score("likeness", "tuned"), table.score("likeness", table.rival())
    gain = table.difference("likeness", "tuned", table.rival())
    if not (tuned and rival and gain):
        return ""
    how = "nearer" if gain.low > 0 else "farther" if gain.high < 0 else "not surely nearer"
    other = "the best prompt" if table.rival() == "prompted" else "the base model"
    return (
        f"Its pictures are {how} to what the designers drew for the same words: likeness {tuned.value:.2f} "
        f"against {rival.value:.2f} for {other}, a difference of {change(gain)}."
    )


def _concept(table: Table, suite: Suite) -> str:
    tuned, base = table.score("concept", "tuned"), table.score("concept", "base")
    gain = table.difference("concept", "tuned", "base")
    if not (tuned and base and gain):
        return ""
    opening = "No clear change in how often it draws what was asked"
    if gain.high < 0:
        opening = "The price: it draws what was asked less often than before"
    elif gain.low > 0:
        opening = "It draws what was asked more often than before"
    return (
        f"{opening}: the judge finds it among its first five of {len(suite.concepts)} guesses in "
        f"{share(tuned)}, against {share(base)} for the base model with the plain prompt; {points(gain)}."
    )


def _copying(table: Table) -> str:
    tuned, own = table.score("nearest", "tuned"), table.score("nearest", "designers")
    beyond = table.score("too_near", "tuned")
    if tuned is None:
        return ""
    if own is None or beyond is None:
        return (
            f"The nearest training picture is at {cosine(tuned)} on average; there is no yardstick for that."
        )
    if beyond.low <= EXPECTED:
        return (
            f"No sign of copying: the nearest training picture is at {tuned.value:.2f} on average; for new "
            f"pictures by the designers themselves it is at {own.value:.2f}."
        )
    return (
        f"Look at the nearest training pictures: {share(beyond)} of its pictures are nearer to one than "
        "99% of this brand's other pictures are."
    )


def _prompting(table: Table, suite: Suite) -> str:
    """Said when training has not paid: on no metric that decides is it surely ahead."""
    gains = table.gains()
    if not gains or any(gain.low > 0 for gain in gains):
        return ""
    who, style = _rival_name(table, suite), table.score("style", table.rival())
    if style and style.value < REACHED:
        return (
            "Neither training nor prompting reached the house style: look at the curves and the pictures, "
            "then try more steps, a higher learning rate or more pictures."
        )
    return f"Prompting would have done: on neither style nor likeness is it surely ahead of {who}."
