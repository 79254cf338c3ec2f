"""What a source says of its pictures: sidecar captions, metadata files and folders named after splits."""

import csv
import io
import json
import posixpath
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any, cast

from livery.data.decode import EXTENSIONS
from livery.data.source import Tree, Unreadable
from livery.nouns import Refused, Split

METADATA = ("metadata.jsonl", "metadata.csv")
CAPTION_COLUMNS = ("text", "caption", "captions")
CLASS_FOLDER = "_class"
"""Pictures below a folder of this name show the class, not the subject: DreamBooth's class photos."""
MASKS = ("-masklabel.png", ".mask.png")
"""Endings that make a file the mask of the picture with the same beginning: cat-masklabel.png of cat.jpg."""

_SPLITS: dict[str, Split] = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
}


@dataclass
class Labels:
    """What is known of the pictures of one source, by file name, and which lines could not be used."""

    captions: dict[str, list[str]] = field(default_factory=dict[str, list[str]])
    attributes: dict[str, dict[str, str]] = field(default_factory=dict[str, dict[str, str]])
    refused: list[Refused] = field(default_factory=list[Refused])
    used: set[str] = field(default_factory=set[str])  # files that hold labels

    def add(self, picture: str, captions: Iterable[str], attributes: dict[str, str]) -> None:
        """Add what one sidecar or row says. Captions are kept once, in the order they came."""
        known = self.captions.setdefault(picture, [])
        known.extend(text for text in dict.fromkeys(captions) if text not in known)
        self.attributes.setdefault(picture, {}).update(attributes)


def read_labels(tree: Tree) -> Labels:
    """Read every metadata file and sidecar of a tree. What cannot be used becomes one refused line each."""
    labels = Labels()
    for name in tree.names:
        if PurePosixPath(name).name in METADATA:
            labels.used.add(name)
            _read_metadata(tree, name, labels)
    sidecars = {name for name in tree.names if name.lower().endswith(".txt")}
    for name in tree.names:
        if name in sidecars or name in labels.used:
            continue
        stem = PurePosixPath(name).with_suffix("").as_posix()
        for sidecar in (f"{stem}.txt", f"{name}.txt"):
            if sidecar in sidecars:
                _read_sidecar(tree, sidecar, name, labels)
    return labels


def split_of(name: str) -> Split | None:
    """The split that a picture's folders name, the outermost first: `brand/validation/cat.png`."""
    for part in PurePosixPath(name).parts[:-1]:
        if split := _SPLITS.get(part.lower()):
            return split
    return None


def shows_class(name: str) -> bool:
    """Whether a picture's folders say that it shows the class: `brand/_class/dog.png`."""
    return CLASS_FOLDER in (part.lower() for part in PurePosixPath(name).parts[:-1])


def masks_of(names: Iterable[str]) -> dict[str, str]:
    """Mask files by the picture that each belongs to, `cat.mask.png` and `cat.jpg.mask.png` alike.

    A file whose picture is not there is no mask.
    """
    endings = {name: next((e for e in MASKS if name.lower().endswith(e)), "") for name in names}
    pictures: dict[str, str] = {}
    for name, ending in endings.items():
        path = PurePosixPath(name)
        if not ending and path.suffix.lower() in EXTENSIONS:
            pictures |= {path.with_suffix("").as_posix(): name, name: name}
    starts = {name: name[: -len(ending)] for name, ending in endings.items() if ending}
    return {pictures[start]: name for name, start in starts.items() if start in pictures}


def _read_sidecar(tree: Tree, sidecar: str, picture: str, labels: Labels) -> None:
    """Each line that is not empty is one caption."""
    first_time = sidecar not in labels.used
    labels.used.add(sidecar)
    try:
        lines = _text(tree.read(sidecar)).splitlines()
    except Unreadable as error:
        if first_time:
            labels.refused.append(Refused(file=sidecar, reason=str(error)))
        return
    labels.add(picture, (line.strip() for line in lines if line.strip()), {})


def _read_metadata(tree: Tree, name: str, labels: Labels) -> None:
    try:
        text = _text(tree.read(name))
    except Unreadable as error:
        labels.refused.append(Refused(file=name, reason=str(error)))
        return
    folder, there = posixpath.dirname(name), set(tree.names)
    for where, row in _rows(name, text):
        try:
            if isinstance(row, Unreadable):
                raise row
            picture = _picture(row, folder, there)
        except Unreadable as error:
            labels.refused.append(Refused(file=f"{name}, {where}", reason=str(error)))
        else:
            labels.add(picture, _captions(row), _attributes(row))


def _rows(name: str, text: str) -> Iterator[tuple[str, dict[str, Any] | Unreadable]]:
    """Each row with where it stands. A row that cannot be read comes as the reason why."""
    if name.endswith(".csv"):
        yield from _csv_rows(text)
        return
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            yield f"line {number}", _json_row(line)


def _json_row(line: str) -> dict[str, Any] | Unreadable:
    try:
        row: Any = json.loads(line)
        json.dumps(row, ensure_ascii=False).encode()  # JSON can spell half characters, which no text can hold
    except (ValueError, RecursionError) as error:
        return Unreadable(f"is not JSON ({error})")
    return cast(dict[str, Any], row) if isinstance(row, dict) else Unreadable("is not a JSON object")


def _csv_rows(text: str) -> Iterator[tuple[str, dict[str, Any] | Unreadable]]:
    reader = csv.DictReader(io.StringIO(text, newline=""))
    try:
        for row in reader:
            cells = cast(dict[str | None, Any], row)  # cells beyond the header come under None
            yield f"line {reader.line_num}", {key: cell for key, cell in cells.items() if key}
    except csv.Error as error:
        yield (
            f"line {reader.line_num + 1}",
            Unreadable(f"is not CSV ({error}): it and all below it are left out"),
        )


def _picture(row: dict[str, Any], folder: str, there: set[str]) -> str:
    """The file that a row speaks of: one of the tree's own names, so nothing outside can be named."""
    name = row.get("file_name")
    if not isinstance(name, str) or not name:
        raise Unreadable("has no file_name")
    picture = posixpath.normpath(posixpath.join(folder, name.replace("\\", "/")))
    if picture not in there:
        raise Unreadable(f"speaks of {name}, which is not there")
    return picture


def _captions(row: dict[str, Any]) -> list[str]:
    found: list[str] = []
    for column in CAPTION_COLUMNS:
        value = row.get(column)
        texts = cast(list[Any], value) if isinstance(value, list) else [value]
        found += [text.strip() for text in texts if isinstance(text, str) and text.strip()]
    return found


def _attributes(row: dict[str, Any]) -> dict[str, str]:
    """Every further column, as text; what is not text is written as JSON."""
    return {
        key: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, sort_keys=True)
        for key, value in row.items()
        if key not in ("file_name", *CAPTION_COLUMNS) and value not in (None, "")
    }


def _text(content: bytes) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Unreadable("is not UTF-8 text: save it as UTF-8") from error
