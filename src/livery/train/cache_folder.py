"""What a cache holds on disk, how much it may hold, and how it is emptied. No torch.

Entries lie in a folder per kind. A file's modification time is when it was last used: reading touches
it. Whatever is removed is made again when it is needed, so this may be done while runs read.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path

from pydantic import NonNegativeInt

from livery.files import write_bytes
from livery.nouns import LiveryError, Noun

LIMIT = 50 << 30
"""Bytes that a cache may hold unless it is told otherwise."""
CLASS = "class"
"""The kind of drawn class photos: outside the limit, for they take minutes to draw."""
SUFFIXES = (".safetensors", ".png")
STALE = 24 * 3600  # seconds after which an untouched temporary file belongs to a dead process

_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}


class CacheShare(Noun):
    """What a cache holds of one kind."""

    what: str
    count: NonNegativeInt
    bytes: NonNegativeInt


class CacheState(Noun):
    """What a cache holds."""

    folder: str
    limit: NonNegativeInt
    shares: tuple[CacheShare, ...]
    freed: NonNegativeInt = 0

    @property
    def bytes(self) -> int:
        """All kinds together."""
        return sum(share.bytes for share in self.shares)


def look(folder: Path, freed: int = 0) -> CacheState:
    """Count the entries by kind."""
    found: dict[str, tuple[int, int]] = {}
    for kind, _, size, _ in _entries(folder):
        count, total = found.get(kind, (0, 0))
        found[kind] = count + 1, total + size
    shares = [CacheShare(what=kind, count=count, bytes=size) for kind, (count, size) in sorted(found.items())]
    return CacheState(folder=str(folder), limit=limit_of(folder), shares=tuple(shares), freed=freed)


def clear(folder: Path) -> int:
    """Remove every entry; how many bytes that freed."""
    return sum(_remove(path, size) for _, path, size, _ in list(_entries(folder)))


def shrink(folder: Path, limit: int) -> int:
    """Remove entries, those unused for longest first, until at most `limit` bytes are left; what is left."""
    _sweep(folder)
    entries = sorted((used, path, size) for kind, path, size, used in _entries(folder) if kind != CLASS)
    left = sum(size for _, _, size in entries)
    for _, path, size in entries:
        if left <= limit:
            break
        _remove(path, size)
        left -= size
    return left


def limit_of(folder: Path) -> int:
    """Bytes that the cache may hold."""
    try:
        return int(json.loads((folder / "limit.json").read_text())["bytes"])
    except (OSError, ValueError, KeyError, TypeError):
        return LIMIT


def set_limit(folder: Path, limit: int) -> None:
    """Keep the limit beside the entries, for all runs that use them."""
    write_bytes(folder / "limit.json", json.dumps({"bytes": limit}).encode())


def size_of(text: str) -> int:
    """'500M', '20 GB', '1.5T' -> bytes; units are powers of 1024. Raises LiveryError for anything else."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(?:i?b)?\s*", text.lower())
    if not found:
        raise LiveryError(f"'{text}' is no size: give a number and a unit, such as 500M or 20G")
    return int(float(found[1]) * _UNITS[found[2]])


def _entries(folder: Path) -> Iterator[tuple[str, Path, int, float]]:
    """(kind, file, bytes, last use) of each entry."""
    for path in folder.rglob("*"):
        if path.suffix not in SUFFIXES or path.name.startswith("."):
            continue
        try:
            facts = path.stat()
        except FileNotFoundError:  # another process removed it
            continue
        parts = path.relative_to(folder).parts
        yield (parts[0] if len(parts) == 3 else "older"), path, facts.st_size, facts.st_mtime


def _remove(path: Path, size: int) -> int:
    path.unlink(missing_ok=True)
    return size


def _sweep(folder: Path) -> None:
    """Delete what a kill left half-written."""
    for path in folder.rglob(".*.safetensors.*"):
        try:
            if time.time() - path.stat().st_mtime > STALE:
                path.unlink()
        except FileNotFoundError:
            continue
