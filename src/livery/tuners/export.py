"""Write an adapter for another tool, read the file back, and keep it only if it means the same.

Each format goes through the reader that imports it: the change of every weight, worked out from the file, is
compared with the adapter's own. The file gets its name only when the largest difference is rounding.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from livery.files import write_bytes
from livery.models.backbone import Backbone
from livery.nouns import AdapterCard, Event, LiveryError, Note, Written, unknown_key
from livery.tuners import tensor_file
from livery.tuners.adapter_file import adapter_bytes
from livery.tuners.check import DTYPES, compare
from livery.tuners.delta import Layer, base_weights, layers, words
from livery.tuners.formats.diffusers_lora import folded, to_diffusers
from livery.tuners.formats.embedding import to_embedding
from livery.tuners.formats.kohya import to_kohya
from livery.tuners.formats.metadata import headers
from livery.tuners.formats.names import DIFFUSERS_SKIPS, kohya_places, swapped_layers
from livery.tuners.importing import read_file
from livery.tuners.merging import write_merged
from livery.tuners.rank import reduced

FORMATS: Mapping[str, str] = {
    "livery": "livery's own: every kind, with the card",
    "diffusers": "PEFT's names: diffusers' load_lora_weights",
    "kohya": "LoRA, LoHa, LoKr with kohya's and LyCORIS' names: A1111, Forge, ComfyUI, SD.Next, diffusers",
    "embedding": "new words: A1111, Forge, ComfyUI",
    "learned_embeds": "new words: diffusers' load_textual_inversion",
    "checkpoint": "the base with the adapter in its weights, one file: A1111, Forge, ComfyUI, kohya",
    "folder": "the same as a diffusers folder",
}


@dataclass(frozen=True)
class Style:
    """How a file is written, beside its format."""

    rank: int | None = None
    dtype: str = "fp32"
    fold_alpha: bool = False
    title: str = ""
    date: str = ""
    tags: Mapping[str, int] | None = None


def export_adapter(
    path: Path,
    card: AdapterCard,
    state: Mapping[str, Tensor],
    backbone: Backbone,
    form: str = "kohya",
    style: Style = Style(),
) -> Iterator[Event]:
    """One adapter as a file of a format (see FORMATS); the last event of each file is Written.

    `style.rank` first brings every layer to plain LoRA of that rank, and Reduced says what that kept. Words
    of a tokens tuner go into the formats for them; with several words `path` is a folder. Raises LiveryError
    when the format has no form for the adapter, or when the file read back is not the same.
    """
    if form not in FORMATS:
        raise LiveryError(f"format: {unknown_key(form, list(FORMATS))}")
    if style.dtype not in DTYPES:
        raise LiveryError(f"dtype: {unknown_key(style.dtype, list(DTYPES))}")
    if card.base_sha256 != backbone.sha256:
        raise LiveryError(
            f"the adapter was made for the base {card.base_sha256[:12]}, this one is {backbone.sha256[:12]}"
        )
    style = style if style.title else Style(**{**vars(style), "title": path.stem})
    if form in ("embedding", "learned_embeds"):
        yield from _export_words(path, card, words(state), backbone, form, style)
        return
    check_ending(path, form)
    found = layers(card.recipe.tuners, state)
    if form == "livery":
        yield from _kept(path, form, adapter_bytes(card, state), found, words(state), backbone, "fp32")
        return
    if not found:
        raise LiveryError("the adapter teaches words only: take the format embedding, or learned_embeds")
    yield from words_left(state)
    if form in ("checkpoint", "folder"):
        yield from write_merged(path, backbone, [(found, 1.0)], style.dtype)
    else:
        yield from _export_layers(path, card, found, backbone, form, style)


def check_ending(path: Path, form: str) -> None:
    """Raises LiveryError where a path does not end as the format needs: tools list files by their ending."""
    if (form == "folder") == (path.suffix == ".safetensors"):
        wanted = "a folder" if form == "folder" else "a file that ends in .safetensors"
        raise LiveryError(f"{path}: format {form} writes {wanted}; name one")


def _export_layers(
    path: Path,
    card: AdapterCard,
    found: Mapping[str, Layer],
    backbone: Backbone,
    form: str,
    style: Style,
) -> Iterator[Event]:
    if style.rank is not None:
        found, report = reduced(found, style.rank, base_weights(backbone))
        yield report
    if form == "kohya":
        if any(layer.is_dora for layer in found.values()):
            yield Note(
                level="warning",
                text="DoRA: tools read its lengths in different ways (see docs/formats.md); with a rank it "
                "becomes a plain LoRA that all read alike",
            )
        tensors, more = to_kohya(found, kohya_places(backbone), swapped_layers(backbone)), dict[str, str]()
    else:
        yield from _skipped(found, card.family)
        found = {name: folded(layer) for name, layer in found.items()} if style.fold_alpha else found
        tensors, more = to_diffusers(found, card.family)
    tensors = _in_dtype(tensors, style.dtype)
    told = headers(card, backbone, found, tensors, title=style.title, date=style.date, tags=style.tags)
    content = tensor_file.to_bytes(tensors, told | more)
    yield from _kept(path, form, content, found, {}, backbone, style.dtype)


def words_left(state: Mapping[str, Tensor]) -> Iterator[Event]:
    """A warning when a state has new words, which a file of weights does not take."""
    if learnt := sorted({word for _, word in words(state)}):
        yield Note(
            level="warning",
            text=f"the new words {' '.join(learnt)} are not in this file: export them as format embedding",
        )


def _skipped(found: Mapping[str, Layer], family: str) -> Iterator[Event]:
    part = DIFFUSERS_SKIPS.get(family, "")
    if count := sum(name.startswith(f"{part}.") for name in found if part):
        yield Note(
            level="warning",
            text=f"diffusers passes over the {count} layers of {part} in this file",
        )


def _in_dtype(tensors: Mapping[str, Tensor], dtype: str) -> dict[str, Tensor]:
    """Alphas stay as they are: a rounded alpha would scale the whole layer."""
    return {name: t if name.endswith(".alpha") else t.to(DTYPES[dtype]) for name, t in tensors.items()}


# ------------------------------------------------------------------ words


def _export_words(
    path: Path,
    card: AdapterCard,
    learnt: Mapping[tuple[str, str], Tensor],
    backbone: Backbone,
    form: str,
    style: Style,
) -> Iterator[Event]:
    names = list(dict.fromkeys(word for _, word in learnt))
    if not names:
        raise LiveryError("the adapter teaches no new word: take another format than embedding")
    towers = list(dict.fromkeys(tower for tower, _ in learnt))
    several = len(names) > 1 or (form == "learned_embeds" and len(towers) > 1)
    if several and path.suffix == ".safetensors":
        raise LiveryError(
            f"{path}: this is more than one file ({', '.join(names)} in {', '.join(towers)}); name a folder"
        )
    for word in names:
        mine = {tower: vectors for (tower, each), vectors in learnt.items() if each == word}
        folder = path if path.suffix != ".safetensors" else None
        stem = "".join(letter for letter in word if letter.isalnum() or letter in "-_") or "word"
        if form == "embedding":
            files = {f"{stem}.safetensors": to_embedding(mine, card.family)}
        elif len(towers) == 1:
            files = {f"{stem}.safetensors": {word: next(iter(mine.values()))}}
        else:
            files = {f"{stem}.{tower}.safetensors": {word: vectors} for tower, vectors in mine.items()}
        for (name, tensors), tower in zip(files.items(), mine if len(files) > 1 else [None], strict=True):
            there = {(t, word): v for t, v in mine.items() if tower in (None, t)}
            rounded = _in_dtype(tensors, style.dtype)
            told = headers(card, backbone, {}, rounded, title=stem, date=style.date)
            content = tensor_file.to_bytes(rounded, told)
            target = folder / name if folder else path
            yield from _kept(target, form, content, {}, there, backbone, style.dtype, word)


# ------------------------------------------------------------------ reading back


def _kept(
    path: Path,
    form: str,
    content: bytes,
    found: Mapping[str, Layer],
    vectors: Mapping[tuple[str, str], Tensor],
    backbone: Backbone,
    dtype: str,
    word: str = "",
) -> Iterator[Event]:
    """Write under another name, read back, compare; the file gets its name only when it means the same."""
    beside = path.with_name(f".{path.stem}.{uuid.uuid4().hex[:8]}.safetensors")
    write_bytes(beside, content)
    try:
        read = read_file(beside, backbone, word)
        yield compare(path, form, found, vectors, read, base_weights(backbone), dtype)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
    yield Written(what=f"adapter for {form}", path=str(path))
