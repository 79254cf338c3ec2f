"""Latents and prompt encodings, made once: named by what they are made from, kept on disk.

A name is a hash of the content (picture or text), of what encodes it, and of how it is prepared: the cut of
a picture, the form of a caption. So a cache is never stale: a changed picture is encoded anew, and a
changed text encoder leaves latents alone. All runs share it, and it may be deleted at any time.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from livery.models.backbone import Backbone, Conditioning
from livery.models.checkpoint import fingerprint
from livery.models.device import send
from livery.nouns import Photo, PicturesSpec, Progress, sha256_of
from livery.train.batches import Row
from livery.train.buckets import Shown, shown_mask, shown_pixels
from livery.train.cache_folder import limit_of, shrink
from livery.train.checkpoint import write_tensors

PREPARATION = 2
"""Raise when `shown_pixels` or an encoder's use changes: old entries are then left alone."""
MEMORY_BYTES = 8 << 20
"""What entries in memory may take: enough for small models, whose steps are short beside a disk's."""


class TensorCache:
    """A folder of safetensors files by kind and name; those used last stay in memory up to a bound.

    On disk it keeps within the folder's limit: what was unused for longest goes first. An entry that went
    is made anew when it is asked for.
    """

    def __init__(self, folder: Path, memory_bytes: int = MEMORY_BYTES) -> None:
        self.folder = folder
        self._bound, self._held = memory_bytes, 0
        self.limit, self._on_disk = limit_of(folder), -1  # not counted yet
        self.full = False
        """Whether something had to go since this cache was opened."""
        self._memory: OrderedDict[tuple[str, str], dict[str, Tensor]] = OrderedDict()

    def get(self, kind: str, name: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """The tensors of that name, on the CPU; made and written when there are none."""
        if found := self._memory.get((kind, name)):
            self._memory.move_to_end((kind, name))
            return found
        found = self._read(kind, name)
        if found is None:
            found = {key: part.detach().cpu().contiguous() for key, part in make().items()}
            self._write(self._file(kind, name), found)
        self._keep((kind, name), found)
        return found

    def has(self, kind: str, name: str) -> bool:
        """Whether there is an entry, which is used by asking. It may be damaged, which `get` finds out."""
        return _touch(self._file(kind, name))

    def _file(self, kind: str, name: str) -> Path:
        return self.folder / kind / name[:2] / f"{name}.safetensors"

    def _read(self, kind: str, name: str) -> dict[str, Tensor] | None:
        path = self._file(kind, name)
        try:
            found = load_file(path)
            _touch(path)
            return found
        except (FileNotFoundError, SafetensorError):  # a damaged entry is made anew
            return None

    def _write(self, path: Path, tensors: dict[str, Tensor]) -> None:
        write_tensors(path, tensors)
        if self._on_disk < 0:
            self._on_disk = shrink(self.folder, self.limit)
        else:
            self._on_disk += _bytes(tensors)
        if self._on_disk > self.limit:  # down to nine tenths, so that not every write has to look
            self._on_disk, self.full = shrink(self.folder, self.limit * 9 // 10), True

    def _keep(self, name: tuple[str, str], tensors: dict[str, Tensor]) -> None:
        self._memory[name] = tensors
        self._held += _bytes(tensors)
        while self._held > self._bound:
            self._held -= _bytes(self._memory.popitem(last=False)[1])


def _touch(path: Path) -> bool:
    """Say that a file was used just now; whether it is there."""
    try:
        os.utime(path)
    except FileNotFoundError:
        return False
    except PermissionError:  # of another user, who shares the folder: it can be read all the same
        return path.is_file()
    return True


def _bytes(tensors: dict[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


class Encodings:
    """What the loop reads instead of pictures and texts.

    Everything is encoded alone, not in batches: an entry has the same bits whatever else the run that
    made it held. When a tuner trains the towers, prompts are encoded anew in each step, with gradients,
    and never cached. To be made before tuners are attached: it takes the hash of what encodes.
    """

    def __init__(
        self,
        backbone: Backbone,
        cache: TensorCache,
        pixels: Callable[[Photo], Image.Image],
        pictures: PicturesSpec,
        *,
        towers_train: bool,
    ) -> None:
        """`pixels` reads a photo, and a mask as the photo that has the mask's hash."""
        self._backbone, self._cache, self._pixels = backbone, cache, pixels
        self._pictures, self.towers_train = pictures, towers_train
        latent = backbone.latent
        facts = [latent.channels, latent.factor, latent.scale, latent.shift]
        self._eye = fingerprint({"vae": backbone.vae}, {"latent": facts})
        self._ear = "" if towers_train else _hash_of_towers(backbone)

    def fill(self, shown: Iterable[Shown], captions: Iterable[str]) -> Iterator[Progress]:
        """Make all that is not there yet, one Progress per picture, as it is shown, and per caption.

        Give `plan.shown()` and `plan.captions()`, and the same of held-out rows.
        """
        pictures = list(shown)
        for done, one in enumerate(pictures, 1):
            if not self._cache.has("latents", self._latents_name(one)):
                self._latents(one)
            if self._masked(one):
                self._mask(one)
            yield Progress(stage="encode pictures", done=done, total=len(pictures))
        texts = [] if self.towers_train else sorted(set(captions))
        for done, text in enumerate(texts, 1):
            if not self._cache.has("prompts", self._prompt_name(text)):
                self._prompt(text)
            yield Progress(stage="encode captions", done=done, total=len(texts))

    def lacking(self, shown: Iterable[Shown], captions: Iterable[str]) -> int:
        """How many of these encodings are not in the cache. After `fill`: those that its limit has no room
        for, which are encoded anew whenever a row needs them. Looks only where something had to go.
        """
        if not self._cache.full:
            return 0
        names = [("latents", self._latents_name(one)) for one in shown]
        names += [("prompts", self._prompt_name(text)) for text in captions if not self.towers_train]
        return sum(not self._cache.has(kind, name) for kind, name in names)

    def latents(self, rows: Sequence[Shown]) -> Tensor:
        """-> [B, C, h, w] fp32 on the backbone's device. All rows are shown at one size."""
        return send(torch.cat([self._latents(row) for row in rows]).float(), self._backbone.device)

    def masks(self, rows: Sequence[Shown]) -> Tensor | None:
        """What each latent cell counts: -> [B, 1, h, w] fp32 in [unmasked_weight, 1] on the device.

        None when every cell of every row counts fully. A photo without a mask counts fully.
        """
        if not any(self._masked(row) for row in rows):
            return None
        factor, floor = self._backbone.latent.factor, self._pictures.unmasked_weight
        view = rows[0].view
        whole = torch.ones(1, view.height // factor, view.width // factor)
        masks = [self._mask(row) if self._masked(row) else whole for row in rows]
        return send(floor + (1 - floor) * torch.stack(masks), self._backbone.device)

    def prompts(self, rows: Sequence[Row]) -> Conditioning:
        """-> B rows on the backbone's device, with `size` as each row's picture is shown."""
        texts, device = [row.caption for row in rows], self._backbone.device
        if self.towers_train:
            made = self._backbone.encode_prompts(texts)
        else:
            made = Conditioning.stack([Conditioning(**self._prompt(text)) for text in texts]).to(device)
        size = send(torch.tensor([row.size for row in rows], dtype=torch.float32), device)
        return replace(made, size=size)

    def _latents(self, one: Shown) -> Tensor:
        name = self._latents_name(one)
        return self._cache.get("latents", name, lambda: {"latents": self._encode(one)})["latents"]

    @torch.no_grad()
    def _encode(self, one: Shown) -> Tensor:
        pixels = shown_pixels(self._pixels(one.photo), one.view)
        with self._as_it_is():
            return self._backbone.encode_images(pixels[None].to(self._backbone.device))

    def _latents_name(self, one: Shown) -> str:
        return sha256_of([PREPARATION, self._eye, one.photo.sha256, *one.view.numbers])

    def _masked(self, one: Shown) -> bool:
        return self._pictures.masks == "loss" and one.photo.mask is not None

    def _mask(self, one: Shown) -> Tensor:
        mask = one.photo.model_copy(update={"sha256": one.photo.mask})
        factor = self._backbone.latent.factor
        name = sha256_of([PREPARATION, factor, mask.sha256, *one.view.numbers])
        return self._cache.get(
            "masks", name, lambda: {"mask": shown_mask(self._pixels(mask), one.view, factor)}
        )["mask"]

    def _prompt(self, text: str) -> dict[str, Tensor]:
        return self._cache.get("prompts", self._prompt_name(text), lambda: self._encode_prompt(text))

    @torch.no_grad()
    def _encode_prompt(self, text: str) -> dict[str, Tensor]:
        with self._as_it_is():
            return self._backbone.encode_prompts([text]).tensors()

    def _as_it_is(self) -> torch.autocast:
        """An entry has the same bits when it is made within a step, under that step's autocast."""
        return torch.autocast(self._backbone.device.type, enabled=False)

    def _prompt_name(self, text: str) -> str:
        return sha256_of([PREPARATION, self._ear, text])


def _hash_of_towers(backbone: Backbone) -> str:
    """Of all that an encoding of a prompt hangs on: the towers' weights and settings, the tokenizers."""
    settings = {name: _settings(cast(Any, tower).config.to_dict()) for name, tower in backbone.towers.items()}
    words = {
        name: [sha256_of(tokenizer.get_vocab()), tokenizer.model_max_length]
        for name, tokenizer in backbone.tokenizers.items()
    }
    return fingerprint(backbone.towers, {"family": backbone.family, "settings": settings, "words": words})


def _settings(config: dict[str, Any]) -> dict[str, str]:
    """A configuration without what tells of files and versions, as text."""
    versions = {"transformers_version", "dtype", "torch_dtype"}
    return {k: str(v) for k, v in config.items() if not k.startswith("_") and k not in versions}
