"""What arms and metrics are called on the page, and numbers in the words of people."""

from __future__ import annotations

from dataclasses import dataclass

from livery.nouns import Run


@dataclass(frozen=True)
class Arm:
    """key; title and subtitle of its column; how a sentence and a small label call it."""

    key: str
    title: str
    subtitle: str
    sentence: str = ""
    short: str = ""


@dataclass(frozen=True)
class Metric:
    key: str
    title: str
    question: str


ARMS = {
    arm.key: arm
    for arm in (
        Arm("base", "Base", "plain prompt", "the plain prompt on the base model", "base model"),
        Arm("prompted", "Prompted", "base, best prompt", "the best prompt on the base model", "best prompt"),
        Arm("tuned", "Tuned", "your adapter", "the tuned model"),
        Arm("designers", "Designers", "the real thing", "the designers"),
        Arm("other designs", "Other designs", "of other things", "the designers' pictures of other things"),
    )
}

METRICS = (
    Metric("style", "House style", "How often does the judge say: this is the house style?"),
    Metric(
        "likeness",
        "Likeness",
        "How near is a picture to what the designers drew for the same words? 1 is the same picture; other "
        "designs are the designers' pictures of other things.",
    ),
    Metric("concept", "What was asked", "How often is the asked thing among the judge's first five guesses?"),
    Metric(
        "nearness",
        "Nearness to the brand",
        "How near is a picture to the middle of the brand's other pictures? 1 is the middle itself.",
    ),
    Metric(
        "nearest",
        "Nearest training picture",
        "How near is the most similar picture that the model learned from? The designers' own new pictures "
        "show what is normal for this brand; far above them would mean copying.",
    ),
)


def duration(seconds: float) -> str:
    """`48 s`, `3 min 20 s`, `2 h 5 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    hours, rest = divmod(minutes, 60)
    return f"{hours} h {rest} min" if rest else f"{hours} h"


def megabytes(count: int) -> str:
    """Bytes as `640 MB` or `2.1 GB` (powers of ten)."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def learning(run: Run) -> str:
    """What the held-out loss did, in one sentence; empty where it was not measured twice."""
    checks = sorted(run.validations, key=lambda check: check.step)
    if len(checks) < 2:
        return ""
    first, last, best = checks[0], checks[-1], min(checks, key=lambda check: check.loss)
    if best.step == first.step:
        return (
            "The held-out loss never fell below where it began: the model may have learned these pictures "
            "rather than the style."
        )
    fell = f"The held-out loss fell from {first.loss:.3f} to {best.loss:.3f}"
    if last.loss > best.loss * 1.02:
        return f"{fell} at step {best.step} and rose again after it: fewer steps may do better."
    return f"{fell}, and did not rise again: on pictures it never saw, the model kept getting better."
