"""Latents and prompt encodings, made once: named by what they are made from, kept on disk.

A name is a hash of the content (picture or text), of the base model, and of how the content is
prepared. So a cache is never stale, can be shared by all runs, and may be deleted at any time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from livery.models.backbone import Backbone, Conditioning
from livery.nouns import Photo, Progress, sha256_of
from livery.train.checkpoint import write_tensors

PREPARATION = 1
"""Raise when `fit_square` or an encoder's use changes: old entries are then left alone."""


class TensorCache:
    """A folder of safetensors files by name; those read lately stay in memory up to a bound."""

    def __init__(self, folder: Path, memory_bytes: int = 1 << 30) -> None:
        self.folder = folder
        self._left = memory_bytes
        self._memory: dict[str, dict[str, Tensor]] = {}

    def get(self, name: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """The tensors of that name, on the CPU; made and written when there are none."""
        found = self._memory.get(name) or self._read(name)
        if found is None:
            found = {key: part.detach().float().cpu().contiguous() for key, part in make().items()}
            write_tensors(self._file(name), found)
        self._keep(name, found)
        return found

    def _file(self, name: str) -> Path:
        return self.folder / name[:2] / f"{name}.safetensors"

    def _read(self, name: str) -> dict[str, Tensor] | None:
        try:
            return load_file(self._file(name))
        except (FileNotFoundError, SafetensorError):  # a damaged entry is made anew
            return None

    def _keep(self, name: str, tensors: dict[str, Tensor]) -> None:
        size = sum(tensor.nbytes for tensor in tensors.values())
        if name not in self._memory and size <= self._left:
            self._left -= size
            self._memory[name] = tensors


def fit_square(image: Image.Image, side: int) -> Tensor:
    """A picture of any shape -> [3, side, side] in [-1, 1].

    The short side is resized (Lanczos, antialiased) and the long one cut evenly at both ends.
    """
    image = image.convert("RGB")
    scale = side / min(image.size)
    width, height = (max(side, round(length * scale)) for length in image.size)
    left, top = (width - side) // 2, (height - side) // 2
    resized = image.resize((width, height), Image.Resampling.LANCZOS)
    square = np.array(resized.crop((left, top, left + side, top + side)), dtype=np.float32)
    return torch.from_numpy(square).permute(2, 0, 1) / 127.5 - 1


class Encodings:
    """What the loop reads instead of pictures and texts.

    Everything is encoded alone, not in batches, and in fp32: an entry has the same bits whatever
    else the run that made it held. When a tuner trains the towers, prompts are encoded anew in
    each step, with gradients, and never cached.
    """

    def __init__(
        self,
        backbone: Backbone,
        cache: TensorCache,
        pixels: Callable[[Photo], Image.Image],
        side: int,
        *,
        towers_train: bool,
    ) -> None:
        self._backbone, self._cache, self._pixels = backbone, cache, pixels
        self._side, self._towers_train = side, towers_train

    def fill(self, photos: Sequence[Photo], captions: Iterable[str]) -> Iterator[Progress]:
        """Make all that is not there yet, one Progress per picture and per caption."""
        for done, photo in enumerate(photos, 1):
            self._latents(photo)
            yield Progress(stage="encode pictures", done=done, total=len(photos))
        texts = [] if self._towers_train else sorted(set(captions))
        for done, text in enumerate(texts, 1):
            self._prompt(text)
            yield Progress(stage="encode captions", done=done, total=len(texts))

    def latents(self, photos: Sequence[Photo]) -> Tensor:
        """-> [B, C, h, w] on the backbone's device."""
        return torch.cat([self._latents(photo) for photo in photos]).to(self._backbone.device)

    def prompts(self, texts: Sequence[str]) -> Conditioning:
        """-> B rows on the backbone's device."""
        if self._towers_train:
            return self._backbone.encode_prompts(texts)
        rows = [Conditioning(**self._prompt(text)) for text in texts]
        return Conditioning.stack(rows).to(self._backbone.device)

    def _latents(self, photo: Photo) -> Tensor:
        name = self._name("latents", photo.sha256, self._side)
        return self._cache.get(name, lambda: {"latents": self._encode(photo)})["latents"]

    @torch.no_grad()
    def _encode(self, photo: Photo) -> Tensor:
        square = fit_square(self._pixels(photo), self._side)
        return self._backbone.encode_images(square[None].to(self._backbone.device))

    def _prompt(self, text: str) -> dict[str, Tensor]:
        return self._cache.get(self._name("prompt", text), lambda: self._encode_prompt(text))

    @torch.no_grad()
    def _encode_prompt(self, text: str) -> dict[str, Tensor]:
        return self._backbone.encode_prompts([text]).tensors()

    def _name(self, *content: str | int) -> str:
        return sha256_of([PREPARATION, self._backbone.sha256, *content])
