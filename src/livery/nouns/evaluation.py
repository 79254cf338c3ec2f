"""Suites, what is measured with them, and reports."""

from __future__ import annotations

from pydantic import Field, NonNegativeFloat, NonNegativeInt

from livery.nouns.base import Noun, Sha256


class Question(Noun):
    """One prompt of a suite and what its picture must show."""

    prompt: str = Field(description="without style words")
    concept: str = Field(default="", description="the label the judge must find; empty = not asked")
    reference: Sha256 | None = Field(default=None, description="blob of the designers' own picture")


class Suite(Noun):
    """What to ask: prompts with what each must show, seeds, and what the judge may answer."""

    name: str
    questions: tuple[Question, ...]
    tuning: tuple[Question, ...] = Field(
        default=(), description="other questions, on which the style prompt is chosen"
    )
    seeds: tuple[NonNegativeInt, ...] = (0, 1)
    style: str = Field(default="", description="the style label that is wanted")
    styles: tuple[str, ...] = Field(default=(), description="every style label the judge may answer")
    concepts: tuple[str, ...] = Field(default=(), description="every concept label, likewise")
    style_prompts: tuple[str, ...] = Field(
        default=(), description="templates with {prompt}; the best one is what prompting can do"
    )
    references: tuple[Sha256, ...] = Field(
        default=(), description="blobs of pictures in the wanted style, other than the answers"
    )


class Interval(Noun):
    """A mean with its 95% bootstrap interval over prompts."""

    value: float
    low: float
    high: float
    n: NonNegativeInt = Field(description="prompts")


class Score(Noun):
    """One metric on one arm."""

    metric: str
    arm: str
    interval: Interval


class Difference(Noun):
    """One metric, arm minus other, paired by prompt and seed."""

    metric: str
    arm: str
    other: str
    interval: Interval


class Picture(Noun):
    """One picture of a report; `sha256` is its PNG blob."""

    arm: str
    prompt: str
    concept: str = ""
    seed: NonNegativeInt
    sha256: Sha256
    scores: dict[str, float] = Field(default={}, description="metric -> this picture's own value")


class Match(Noun):
    """A picture of the tuned model and the training picture nearest to it, as the judge sees them."""

    sha256: Sha256
    reference: Sha256 = Field(description="blob of the training picture")
    similarity: float = Field(description="cosine")
    mirrored: bool = Field(default=False, description="the mirror image of the training picture was nearer")


class Report(Noun):
    """Scores, pictures and verdict of one adapter on one suite, always against its base."""

    title: str
    adapter: Sha256 | None
    base_sha256: Sha256
    dataset: Sha256 | None
    run: Sha256 | None = None
    suite: Sha256
    embedder: str = Field(description="name of the judge")
    embedder_sha256: Sha256
    style_prompt: str = Field(description="the template that won on the tuning questions")
    arms: tuple[str, ...]
    scores: tuple[Score, ...]
    differences: tuple[Difference, ...]
    pictures: tuple[Picture, ...]
    nearest: tuple[Match, ...] = Field(default=(), description="the most similar first, a few only")
    drawing: str = Field(default="", description="how every arm drew: sampler, steps, guidance")
    verdict: tuple[str, ...] = Field(description="plain sentences, the most important first")
    passed: bool = Field(description="tuned beats the best prompt on style and on likeness")
    seconds: NonNegativeFloat
    html: Sha256 | None = Field(default=None, description="blob of the page")
