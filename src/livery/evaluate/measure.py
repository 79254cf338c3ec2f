"""All questions asked of one set of pictures: metric -> {row number: value}."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from livery.evaluate import copying, fidelity, prompt
from livery.evaluate.embedder import Embedder
from livery.nouns import LiveryError, Suite

Values = dict[str, dict[int, float]]
CHUNK = 64  # pictures held decoded at a time


@dataclass(frozen=True)
class Row:
    """One picture of an arm: which question it answers, with which seed, and its blob."""

    question: int
    seed: int
    sha256: str


@dataclass(frozen=True)
class Yardsticks:
    """What pictures are held against, embedded once. Parts that the suite does not give are none.

    concepts [M, D], styles [S, D], centre [D], originals: question -> [D], null [R].
    """

    suite: Suite
    concepts: Tensor | None
    styles: Tensor | None
    centre: Tensor | None
    originals: dict[int, Tensor]
    shelf: copying.Shelf | None
    null: Tensor | None

    def style_values(self, vectors: Tensor) -> Values:
        """The two questions that need no knowledge of what was asked: style, nearness."""
        values: Values = {}
        if self.styles is not None:
            wanted = self.suite.styles.index(self.suite.style)
            values["style"] = _all(fidelity.style_recognised(vectors, self.styles, wanted))
        if self.centre is not None:
            values["nearness"] = _all(fidelity.nearness(vectors, self.centre))
        return values

    def values(self, rows: Sequence[Row], vectors: Tensor) -> Values:
        """Every question that the suite lets us ask of these pictures; vectors [N, D], one per row."""
        values = {**self.style_values(vectors), "likeness": {}, "concept": {}}
        likened = [n for n, row in enumerate(rows) if row.question in self.originals]
        if likened:
            originals = torch.stack([self.originals[rows[n].question] for n in likened])
            values["likeness"] = _some(likened, fidelity.likeness(vectors[likened], originals))
        questions = self.suite.questions
        named = [n for n, row in enumerate(rows) if questions[row.question].concept]
        if named and self.concepts is not None:
            asked = [questions[rows[n].question].concept for n in named]
            numbers = prompt.label_numbers(asked, self.suite.concepts)
            values["concept"] = _some(named, prompt.concept_found(vectors[named], self.concepts, numbers))
        if self.shelf is not None:
            near = self.shelf.nearest(vectors).similarity
            values["nearest"] = _all(near)
            if self.null is not None:
                values["too_near"] = _all(copying.too_near(near, self.null))
        return {metric: found for metric, found in values.items() if found}


def yardsticks(
    suite: Suite, embedder: Embedder, read: Callable[[str], Image.Image], train_photos: Sequence[str]
) -> Yardsticks:
    """Embed what the suite and the training set give. Raises LiveryError for a suite at odds with itself."""
    if suite.styles and suite.style not in suite.styles:
        raise LiveryError(f"suite {suite.name}: style '{suite.style}' is not among its styles; add it there.")
    answered = {n: q.reference for n, q in enumerate(suite.questions) if q.reference}
    own = look(embedder, read, list(answered.values()))
    shelf = _shelf(embedder, read, train_photos)
    return Yardsticks(
        suite=suite,
        concepts=embedder.embed_texts(embedder.card.concept_texts(suite.concepts))
        if suite.concepts
        else None,
        styles=embedder.embed_texts(embedder.card.style_texts(suite.styles)) if suite.styles else None,
        centre=fidelity.style_centre(look(embedder, read, suite.references)) if suite.references else None,
        originals=dict(zip(answered, own, strict=True)),
        shelf=shelf,
        null=shelf.nearest(own).similarity if shelf and len(own) else None,
    )


def look(embedder: Embedder, read: Callable[[str], Image.Image], blobs: Sequence[str]) -> Tensor:
    """Embed stored pictures, a few at a time -> [N, D]."""
    chunks = (blobs[start : start + CHUNK] for start in range(0, len(blobs), CHUNK))
    parts = [embedder.embed_images([read(blob) for blob in chunk]) for chunk in chunks]
    return torch.cat(parts) if parts else embedder.embed_images([])


def _shelf(
    embedder: Embedder, read: Callable[[str], Image.Image], photos: Sequence[str]
) -> copying.Shelf | None:
    return copying.Shelf.of(embedder, photos, [read(photo) for photo in photos]) if photos else None


def _all(values: Tensor) -> dict[int, float]:
    return _some(range(len(values)), values)


def _some(rows: Sequence[int], values: Tensor) -> dict[int, float]:
    """Six decimals: more than any judge means, and short in the report."""
    return {row: round(value, 6) for row, value in zip(rows, values.tolist(), strict=True)}
