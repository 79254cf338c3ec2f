"""A judge whose answers are known: a picture is one flat colour, and its colour says what it is.

Red = number of the concept, green = number of the style, blue = any mark. Texts are "a thing N" and
"look N style". So every score of an evaluation can be worked out by hand.
"""

import hashlib
import io
from collections.abc import Iterator, Sequence

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from livery.evaluate.embedder import JudgeCard
from livery.nouns import LiveryError

CONCEPTS, STYLES = 12, 3


def flat(concept: int, style: int, mark: int = 0) -> Image.Image:
    return Image.new("RGB", (8, 8), (concept, style, mark))


class FakeEmbedder:
    name = "fake judge"
    sha256 = hashlib.sha256(b"fake").hexdigest()
    card = JudgeCard(
        concept_template="a {concept}", style_template="{style} style", reliability={"style": 0.97}
    )

    def embed_images(self, images: Sequence[Image.Image]) -> Tensor:
        """One-hot concept beside one-hot style and a little of the mark -> length 1."""
        rows = torch.zeros(len(images), CONCEPTS + STYLES + 1)
        for row, image in zip(rows, images, strict=True):
            concept, style, mark = image.getpixel((0, 0))  # type: ignore[misc]
            row[concept], row[CONCEPTS + style], row[-1] = 1, 1, mark / 255
        return normalize(rows, dim=-1)

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        rows = torch.zeros(len(texts), CONCEPTS + STYLES + 1)
        for row, text in zip(rows, texts, strict=True):
            number = int("".join(c for c in text if c.isdigit()))
            if text.startswith("a thing "):  # five other concepts are half as good a guess
                row[[(number + step) % CONCEPTS for step in range(1, 6)]] = 0.5
                row[number] = 1
            else:
                row[CONCEPTS + number] = 1
        return rows


class Blobs:
    """A store of blobs in memory."""

    def __init__(self) -> None:
        self.kept: dict[str, bytes] = {}

    def put(self, data: bytes) -> str:
        sha256 = hashlib.sha256(data).hexdigest()
        self.kept[sha256] = data
        return sha256

    def put_image(self, image: Image.Image) -> str:
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        return self.put(buffer.getvalue())

    def read(self, sha256: str) -> Image.Image:
        if sha256 not in self.kept:
            raise LiveryError(f"no blob {sha256}")
        return Image.open(io.BytesIO(self.kept[sha256]))


class FakeEngine:
    """Draws the concept that the prompt names, in the style that the model and prompt lead to.

    base: style 0, or style 2 (the wanted one) for even seeds when the prompt says "like two";
    tuned: style 2, but concept 0 for thing 1, to make it lose a known amount of concept.
    """

    def __init__(self, die_after: int | None = None) -> None:
        self.calls: list[tuple[str, str, int]] = []
        self.die_after = die_after

    def __call__(self, model: str, prompts: Sequence[str], seeds: Sequence[int]) -> Iterator[Image.Image]:
        for prompt, seed in zip(prompts, seeds, strict=True):
            if self.die_after is not None and len(self.calls) >= self.die_after:
                raise KeyboardInterrupt
            self.calls.append((model, prompt, seed))
            thing = int(prompt.split("thing ")[1].split(",")[0].split(" ")[0])
            if model == "tuned":
                yield flat(0 if thing == 1 else thing, 2, seed)
            else:
                yield flat(thing, 2 if "like two" in prompt and seed % 2 == 0 else 0, seed)
