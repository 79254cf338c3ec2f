"""Drawing the pictures of an evaluation, so that a kill loses at most the picture in hand."""

from __future__ import annotations

import io
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from PIL import Image

from livery.files import write_bytes
from livery.nouns import Event, LiveryError, Progress, sha256_of

Model = Literal["base", "tuned"]
Generate = Callable[[Model, Sequence[str], Sequence[int]], Iterator[Image.Image]]
"""(which model, prompts, seeds: one per prompt) -> one picture per prompt, in order, as each is done."""


@dataclass(frozen=True)
class Memory:
    """A folder that remembers which picture was already drawn: one small file per picture, written whole.

    Keyed by all that decides a picture: model, settings, prompt and seed. Without a folder it forgets.
    """

    folder: Path | None

    def recall(self, key: str) -> str | None:
        """The blob of the picture with this key, or none."""
        if self.folder is None:
            return None
        try:
            return (self.folder / key).read_text().strip() or None
        except FileNotFoundError:
            return None

    def keep(self, key: str, sha256: str) -> None:
        if self.folder is None:
            return
        write_bytes(self.folder / key, sha256.encode())


@dataclass(frozen=True)
class Desk:
    """What drawing needs: the engine, where pictures go, and what is already there.

    models: for "base" and "tuned", a text that changes whenever their pictures would: hashes, sampler.
    """

    generate: Generate
    read_picture: Callable[[str], Image.Image]
    put_blob: Callable[[bytes], str]
    memory: Memory
    models: dict[Model, str]

    def draw(
        self, stage: str, model: Model, prompts: Sequence[str], seeds: Sequence[int]
    ) -> Generator[Event, None, list[str]]:
        """One picture per prompt and seed: yields Progress, returns the blobs in order, or LiveryError."""
        keys = [self._key(model, prompt, seed) for prompt, seed in zip(prompts, seeds, strict=True)]
        blobs = {number: blob for number, key in enumerate(keys) if (blob := self._recall(key))}
        missing = [number for number in range(len(keys)) if number not in blobs]
        yield Progress(stage=stage, done=len(blobs), total=len(keys))
        if missing:
            images = self.generate(model, [prompts[n] for n in missing], [seeds[n] for n in missing])
            for number, image in zip(missing, images, strict=False):
                blobs[number] = self.put_blob(png(image))
                self.memory.keep(keys[number], blobs[number])
                yield Progress(stage=stage, done=len(blobs), total=len(keys))
        if len(blobs) < len(keys):
            raise LiveryError(f"the {model} model drew {len(blobs)} of {len(keys)} pictures; run it again.")
        return [blobs[number] for number in range(len(keys))]

    def _key(self, model: Model, prompt: str, seed: int) -> str:
        return sha256_of([self.models[model], prompt, seed])

    def _recall(self, key: str) -> str | None:
        """A remembered picture counts only when it can still be read."""
        blob = self.memory.recall(key)
        try:
            return blob if blob and self.read_picture(blob) else None
        except (LiveryError, OSError):
            return None


def png(image: Image.Image) -> bytes:
    """The bytes that are stored and judged: RGB, no metadata, so that equal pictures have one hash."""
    buffer = io.BytesIO()
    plain = Image.frombytes("RGB", image.size, image.convert("RGB").tobytes())
    plain.save(buffer, "PNG")
    return buffer.getvalue()
