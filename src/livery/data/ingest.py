"""A folder or a zip of pictures becomes a Dataset. One bad file costs one line, never the rest."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from PIL import ImageColor

from livery.data.decode import EXTENSIONS, FORMATS, Clean, clean, grey, sniff
from livery.data.labels import Labels, masks_of, read_labels, shows_class, split_of
from livery.data.source import Tree, Unreadable, open_tree
from livery.nouns import Dataset, Event, Ingested, LiveryError, Note, Photo, Progress, Refused

MAX_PIXELS = 64_000_000
Masks = Literal["ignore", "alpha", "files"]
"""Where masks come from: nowhere, each picture's own transparency, or files such as cat-masklabel.png."""

_FIELDS = {"licence": "licence", "license": "licence", "attribution": "attribution", "consent": "consent"}
"""Metadata columns that are fields of a Photo; all others become attributes."""
_NUMBERS: dict[str, tuple[str, type[int] | type[float]]] = {
    "repeats": ("repeats", int),
    "loss_weight": ("weight", float),
}
_PICTURES = EXTENSIONS | {".gif", ".tif", ".tiff", ".bmp", ".heic", ".heif", ".avif", ".svg", ".psd", ".jxl"}


@dataclass(frozen=True)
class Rules:
    """How pictures are taken in: what the caller of `ingest` chose."""

    background: str
    max_pixels: int
    require_captions: bool
    validation: float
    seed: int
    licence: str
    attribution: str
    masks: Masks = "ignore"

    def check(self) -> tuple[int, int, int]:
        """The background as red, green, blue in 0-255. Raises LiveryError for a rule that makes no sense."""
        if not 0 <= self.validation < 1:
            raise LiveryError(f"validation is {self.validation}: give a share of at least 0 and below 1")
        if self.max_pixels < 1:
            raise LiveryError(f"max_pixels is {self.max_pixels}: give at least 1")
        try:
            return ImageColor.getcolor(self.background, "RGB")[:3]  # pyright: ignore
        except ValueError as error:
            raise LiveryError(
                f"'{self.background}' is no colour: give one such as #ffffff or white"
            ) from error


@dataclass
class _Taken:
    """The photos so far, by the hash of their pixels, and what was done to them."""

    photos: dict[str, Photo] = field(default_factory=dict[str, Photo])
    done: Counter[str] = field(default_factory=Counter[str])
    refused: int = 0


def ingest(
    source: Path,
    put_blob: Callable[[bytes], str],
    *,
    name: str | None = None,
    background: str = "#ffffff",
    max_pixels: int = MAX_PIXELS,
    require_captions: bool = False,
    validation: float = 0.0,
    seed: int = 0,
    licence: str | None = None,
    attribution: str | None = None,
    masks: Masks = "ignore",
) -> Iterator[Event]:
    """Read every picture of a folder or zip, keep it by `put_blob`, and end with Ingested(dataset).

    Captions come from sidecars (cat.txt beside cat.png, one caption a line) and from metadata.jsonl or
    metadata.csv (file_name; text or caption; further columns become attributes). Folders called train,
    validation and test set the split. Transparency is laid on `background`; `validation` is the share
    of pictures to hold out, chosen by `seed`; `licence` and `attribution` hold where metadata names none.
    `masks` says where a photo's mask comes from. Pictures in a folder called _class show the class, not the
    subject; metadata columns `repeats` and `loss_weight` say how often a picture is shown and how much its
    rows count.

    Yields Progress per picture, Refused per file that is not taken, and Note for what was changed in one.
    Raises LiveryError when the source cannot be opened, a rule makes no sense, or no picture is left.
    """
    rules = Rules(
        background, max_pixels, require_captions, validation, seed, licence or "", attribution or "", masks
    )
    colour = rules.check()
    taken = _Taken()
    with open_tree(source) as tree:
        labels = read_labels(tree)
        yield from _refuse(taken, [*tree.refused, *labels.refused])
        beside = masks_of(tree.names)
        pictures, others = _sort(tree, labels, set(beside.values()))
        if beside and masks != "files":
            yield Note(text=f"masks, left alone (take them with masks = files): {_some([*beside.values()])}")
        for number, file in enumerate(pictures, 1):
            try:
                cleaned = clean(_content(tree, file, labels, rules), colour, max_pixels)
                training = _training(labels, file)
                mask, refused = _mask(tree, beside.get(file), cleaned, rules)
                yield from _refuse(taken, refused)
                if mask:
                    training["mask"] = put_blob(mask)
                yield from _take(taken, file, cleaned, put_blob(cleaned.png), labels, rules, training)
            except Unreadable as error:
                yield from _refuse(taken, [Refused(file=file, reason=str(error))])
            yield Progress(stage="ingest", done=number, total=len(pictures))
    if others:
        yield Note(text=f"not pictures, left alone: {_some(others)}")
    if not taken.photos:
        raise LiveryError(f"{source}: no picture could be taken, {taken.refused} files were refused")
    yield Ingested(dataset=_dataset(taken, name or source.resolve().stem, rules))


def _sort(tree: Tree, labels: Labels, masks: set[str]) -> tuple[list[str], list[str]]:
    """The files that are pictures by name or by content, and those that are neither pictures nor labels."""
    pictures: list[str] = []
    others: list[str] = []
    for file in tree.names:
        if file in labels.used or file in masks:
            continue
        (pictures if _is_picture(tree, file) else others).append(file)
    return pictures, others


def _is_picture(tree: Tree, file: str) -> bool:
    if PurePosixPath(file).suffix.lower() in _PICTURES:
        return True
    try:
        return sniff(tree.read(file, 512)) is not None
    except Unreadable:
        return False


def _content(tree: Tree, file: str, labels: Labels, rules: Rules) -> bytes:
    """The bytes of a picture that by its name, its first bytes and its captions may be taken."""
    found, suffix = sniff(tree.read(file, 512)), PurePosixPath(file).suffix.lower()
    if found is None:
        raise Unreadable("is not an image, whatever its name says")
    if found not in FORMATS:
        raise Unreadable(f"is {found}, which livery does not read: save it as PNG, JPEG or WebP")
    if suffix not in EXTENSIONS:
        raise Unreadable(f"is {found} by content but is not named so: rename it to .{found.lower()}")
    if rules.require_captions and not labels.captions.get(file) and not shows_class(file):
        sidecar = PurePosixPath(file).with_suffix(".txt").name
        raise Unreadable(f"has no caption: write one into {sidecar} beside it")
    return tree.read(file)


def _training(labels: Labels, file: str) -> dict[str, Any]:
    """How a picture is trained on, in the fields of a Photo. Raises Unreadable for what is no number."""
    found: dict[str, Any] = {"prior": shows_class(file)}
    for column, (name, kind) in _NUMBERS.items():
        text = labels.attributes.get(file, {}).get(column)
        if text is None:
            continue
        try:
            found[name] = kind(text)
            Photo(sha256="0" * 64, width=1, height=1, **found)
        except ValueError as error:
            raise Unreadable(f"has {column} '{text}' in its metadata: give a number above 0") from error
    return found


def _mask(tree: Tree, beside: str | None, cleaned: Clean, rules: Rules) -> tuple[bytes | None, list[Refused]]:
    """A picture's mask as a grey PNG, if it has one, and the mask file that could not be used."""
    if rules.masks == "alpha":
        return cleaned.opacity, []
    if rules.masks == "ignore" or beside is None:
        return None, []
    try:
        mask = clean(tree.read(beside), (255, 255, 255), rules.max_pixels)
    except Unreadable as error:
        return None, [Refused(file=beside, reason=str(error))]
    if abs(mask.width * cleaned.height / mask.height - cleaned.width) > 0.01 * cleaned.width + 1:
        here, there = f"{mask.width} x {mask.height}", f"{cleaned.width} x {cleaned.height}"
        reason = f"is a mask of {here} pixels for a picture of {there}: give it the same shape"
        return None, [Refused(file=beside, reason=reason)]
    return grey(mask), []


def _take(
    taken: _Taken,
    file: str,
    cleaned: Clean,
    sha: str,
    labels: Labels,
    rules: Rules,
    training: dict[str, Any],
) -> Iterator[Event]:
    captions = labels.captions.get(file, [])
    if first := taken.photos.get(sha):
        taken.photos[sha] = first.model_copy(
            update={"captions": tuple(dict.fromkeys([*first.captions, *captions]))}
        )
        reason = f"is the same picture as {first.source}, which keeps the captions of both"
        yield from _refuse(taken, [Refused(file=file, reason=reason)])
        return
    attributes = labels.attributes.get(file, {})
    fields = {_FIELDS[key]: value for key, value in attributes.items() if key in _FIELDS}
    taken.photos[sha] = Photo(
        sha256=sha,
        width=cleaned.width,
        height=cleaned.height,
        captions=tuple(captions),
        split=split_of(file) or "train",
        attributes={k: value for k, value in attributes.items() if k not in _FIELDS and k not in _NUMBERS},
        source=file,
        licence=fields.get("licence", rules.licence),
        attribution=fields.get("attribution", rules.attribution),
        consent=fields.get("consent", ""),
        **training,
    )
    changes = list(_changes(cleaned, rules))
    taken.done.update(changes)
    if (
        cleaned.removed or cleaned.turned or cleaned.colours_converted
    ):  # transparency: the dataset's note will do
        yield Note(text=f"{file}: {', '.join(changes)}")


def _changes(cleaned: Clean, rules: Rules) -> Iterator[str]:
    if cleaned.removed:
        yield f"{', '.join(cleaned.removed)} metadata removed"
    if cleaned.turned:
        yield "turned upright"
    if cleaned.laid_on_background:
        yield f"transparency laid on {rules.background}"
    if cleaned.colours_converted:
        yield "colours converted to sRGB"


def _refuse(taken: _Taken, refused: list[Refused]) -> Iterator[Refused]:
    taken.refused += len(refused)
    yield from refused


def _dataset(taken: _Taken, name: str, rules: Rules) -> Dataset:
    """The manifest. Its notes tell how many pictures were changed and how, so that its card can."""
    notes = [f"{what}: {count} of {len(taken.photos)}" for what, count in sorted(taken.done.items())]
    photos = _hold_out(tuple(taken.photos.values()), rules)
    return Dataset(name=name, photos=photos, background=rules.background, notes=tuple(notes))


def _hold_out(photos: tuple[Photo, ...], rules: Rules) -> tuple[Photo, ...]:
    """Move a share of the training photos to validation, chosen by content and seed, not by order.

    At least one is moved and at least one is left. A source that has a validation split keeps its own.
    """
    train = [photo.sha256 for photo in photos if photo.split == "train" and not photo.prior]
    has_own = any(photo.split == "validation" for photo in photos)
    if has_own or not rules.validation or len(train) < 2:
        return photos
    count = min(max(1, round(rules.validation * len(train))), len(train) - 1)
    held = set(sorted(train, key=lambda sha: hashlib.sha256(f"{rules.seed}:{sha}".encode()).digest())[:count])
    return tuple(
        photo.model_copy(update={"split": "validation"}) if photo.sha256 in held else photo
        for photo in photos
    )


def _some(files: list[str]) -> str:
    return ", ".join(files[:5]) + (f" and {len(files) - 5} more" if len(files) > 5 else "")
