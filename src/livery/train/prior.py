"""Class photos for DreamBooth: those that a dataset brings, and those that the base draws itself.

Ruiz et al. 2022 (arXiv:2208.12242), section 4.2. All else is data: a row of the class has the class's
prompt as its caption and its own weight, whatever tuner learns from it.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Generator, Iterable, Sequence
from pathlib import Path

from PIL import Image

from livery.files import write_bytes
from livery.nouns import LiveryError, Photo, PriorSpec, Progress, sha256_of

Draw = Callable[[Sequence[str], Sequence[int]], Iterable[Image.Image]]
"""Prompts and as many seeds -> pictures."""

AT_ONCE = 8
"""Pictures drawn together. Always the same ones, so that a picture has the same bits whenever it is drawn."""


class ClassPhotos:
    """Pictures of a class as the base draws it, each a PNG file in a folder that all runs share.

    Its name is the hash of (base, prompt, seed, index). They are kept outside a cache's limit: they take
    minutes to draw, and a run that goes on must find the same ones.
    """

    def __init__(self, folder: Path, base_sha256: str) -> None:
        self._folder, self._base = folder, base_sha256
        self._files: dict[str, Path] = {}

    def complete(
        self, photos: Sequence[Photo], prior: PriorSpec, draw: Draw | None
    ) -> Generator[Progress, None, tuple[Photo, ...]]:
        """Draw what lacks: one Progress per picture; returns the photos and behind them those drawn.

        To be called before anything is attached to the base. Where the recipe wants no class photos,
        nothing is drawn. Raises LiveryError when some lack and there is nothing to draw with.
        """
        found = sum(photo.prior for photo in photos)
        lacking = max(0, prior.count - found) if prior.kind == "photos" else 0
        drawn: list[Photo] = []
        for index in range(lacking):
            path = self._path(prior, index)
            if not path.is_file():
                if draw is None:
                    raise LiveryError(
                        f"prior.count is {prior.count} and the dataset has {found} class photos, but nothing "
                        "was given to draw the others: add some in a folder called _class, or lower it"
                    )
                self._draw(prior, index, draw)
            drawn.append(self._photo(path, prior.prompt))
            yield Progress(stage="draw class photos", done=index + 1, total=lacking)
        return (*photos, *drawn)

    def reading(self, pixels: Callable[[Photo], Image.Image]) -> Callable[[Photo], Image.Image]:
        """A reader of these pictures, and through `pixels` of all others."""

        def read(photo: Photo) -> Image.Image:
            path = self._files.get(photo.sha256)
            return Image.open(path) if path else pixels(photo)

        return read

    def _draw(self, prior: PriorSpec, index: int, draw: Draw) -> None:
        """Draw the picture and those drawn together with it; those that are there already stay."""
        first = index - index % AT_ONCE
        indices = range(first, first + AT_ONCE)
        images = draw([prior.prompt] * AT_ONCE, [_seed(prior.seed, each) for each in indices])
        for each, image in zip(indices, images, strict=True):
            path = self._path(prior, each)
            if not path.is_file():
                buffer = io.BytesIO()
                image.convert("RGB").save(buffer, "PNG")
                write_bytes(path, buffer.getvalue())

    def _path(self, prior: PriorSpec, index: int) -> Path:
        name = sha256_of([self._base, prior.prompt, prior.seed, index])
        return self._folder / name[:2] / f"{name}.png"

    def _photo(self, path: Path, prompt: str) -> Photo:
        content = path.read_bytes()
        sha256 = hashlib.sha256(content).hexdigest()
        self._files[sha256] = path
        with Image.open(io.BytesIO(content)) as image:
            width, height = image.size
        source = f"drawn by the base: {path.name}"
        return Photo(sha256=sha256, width=width, height=height, captions=(prompt,), source=source, prior=True)


def _seed(seed: int, index: int) -> int:
    """The seed of one picture; those of neighbouring seeds never meet."""
    return int(sha256_of([seed, index])[:8], 16)
