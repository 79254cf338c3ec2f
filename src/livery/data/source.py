"""Where pictures come from: a folder or a zip, seen as named files. Nothing is ever unpacked to disk."""

import os
import stat
import zipfile
import zlib
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO, Protocol

from livery.nouns import LiveryError, Refused

MAX_FILE_BYTES = 256 << 20  # of one file, unpacked
MAX_ENTRIES = 100_000  # of an archive
MAX_ARCHIVE_BYTES = 32 << 30  # of everything in an archive, unpacked
MAX_RATIO = 100  # of unpacked to packed bytes, over a whole archive; pictures hardly pack at all
RATIO_FREE_BYTES = 16 << 20  # archives that unpack to less than this are let off the ratio


class Unreadable(LiveryError):
    """One file cannot be used. The message is the reason alone, in words that follow the file's name."""


class Tree(Protocol):
    """Named files. `names` are POSIX paths in sorted order; `refused` is what was left out already."""

    @property
    def names(self) -> tuple[str, ...]: ...

    @property
    def refused(self) -> tuple[Refused, ...]: ...

    def read(self, name: str, limit: int | None = None) -> bytes:
        """A file's first `limit` bytes, by default all of them. Raises Unreadable."""
        ...


@contextmanager
def open_tree(source: Path) -> Generator[Tree, None, None]:
    """A folder or a zip as a Tree. Raises LiveryError when it is neither, or when the zip is over a limit."""
    if source.is_dir():
        yield _walk(source)
    elif not source.exists():
        raise LiveryError(f"{source}: there is no such folder or zip file")
    elif not zipfile.is_zipfile(source):
        raise LiveryError(f"{source}: neither a folder nor a zip file")
    else:
        try:
            archive = zipfile.ZipFile(source)
        except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
            raise LiveryError(f"{source}: a broken zip file ({error})") from error
        with archive:
            yield _list(archive, source)


def hidden(name: str) -> bool:
    """Whether a file is an operating system's own, such as .DS_Store: those are passed over in silence."""
    parts = PurePosixPath(name).parts
    return any(part.startswith(".") or part == "__MACOSX" for part in parts) or parts[-1] in (
        "Thumbs.db",
        "desktop.ini",
    )


# Folders


@dataclass(frozen=True)
class Folder:
    """The regular files below a folder."""

    root: Path
    names: tuple[str, ...]
    refused: tuple[Refused, ...]

    def read(self, name: str, limit: int | None = None) -> bytes:
        """See Tree."""
        try:
            with (self.root / name).open("rb") as file:
                return _bounded(file, limit)
        except OSError as error:
            raise Unreadable(f"cannot be read ({error.strerror})") from error


def _walk(root: Path) -> Folder:
    names: list[str] = []
    refused: list[Refused] = []
    inside = root.resolve()
    for folder, folders, files in os.walk(root):
        for entry in [*folders, *files]:
            path = Path(folder) / entry
            name = path.relative_to(root).as_posix()
            if hidden(name):
                continue
            if not _is_text(name):
                shown = name.encode(errors="replace").decode()
                refused.append(Refused(file=shown, reason="has a name that is not UTF-8: rename it"))
            elif reason := _leads_astray(path, inside):
                refused.append(Refused(file=name, reason=reason))
            elif path.is_file():
                names.append(name)
    return Folder(root, tuple(sorted(names)), tuple(sorted(refused, key=lambda event: event.file)))


def _is_text(name: str) -> bool:
    """Whether a name from the file system, where names are any bytes, can be written down as text."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _leads_astray(path: Path, inside: Path) -> str | None:
    """Why this entry of a folder must not be followed."""
    if path.is_symlink():
        if not path.exists():
            return "is a link that leads nowhere: copy the file here"
        if not path.resolve().is_relative_to(inside):
            return "is a link that leads out of the folder: copy the file here"
        if path.is_dir():
            return "is a link to a folder: its pictures are read where they lie"
    elif not (path.is_file() or path.is_dir()):
        return "is not a regular file"
    return None


# Archives


@dataclass(frozen=True)
class Archive:
    """The files of a zip, read in place."""

    archive: zipfile.ZipFile
    names: tuple[str, ...]
    refused: tuple[Refused, ...]
    entries: dict[str, zipfile.ZipInfo] = field(repr=False)

    def read(self, name: str, limit: int | None = None) -> bytes:
        """See Tree."""
        try:
            with self.archive.open(self.entries[name]) as file:
                return _bounded(file, limit)
        except (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError) as error:
            raise Unreadable(f"is broken inside the zip ({error})") from error
        except (NotImplementedError, RuntimeError) as error:
            raise Unreadable(f"cannot be unpacked ({error}): zip it again with plain compression") from error


def _list(archive: zipfile.ZipFile, source: Path) -> Archive:
    infos = [info for info in archive.infolist() if not info.is_dir()]
    _check_limits(infos, source)
    entries: dict[str, zipfile.ZipInfo] = {}
    refused: list[Refused] = []
    for info in infos:
        if reason := _unsafe(info):
            refused.append(Refused(file=info.filename, reason=reason))
        elif hidden(info.filename):
            continue
        elif (name := PurePosixPath(info.filename).as_posix()) in entries:
            refused.append(Refused(file=name, reason="is in the zip twice: the first is taken"))
        else:
            entries[name] = info
    return Archive(archive, tuple(sorted(entries)), tuple(refused), entries)


def _check_limits(infos: list[zipfile.ZipInfo], source: Path) -> None:
    """By what the zip's directory says, before a byte is unpacked; reading never goes beyond that."""
    if len(infos) > MAX_ENTRIES:
        raise LiveryError(f"{source}: {len(infos):,} files, over the limit of {MAX_ENTRIES:,}: split it")
    unpacked = sum(info.file_size for info in infos)
    if unpacked > MAX_ARCHIVE_BYTES:
        raise LiveryError(
            f"{source}: unpacks to {unpacked:,} bytes, over the limit of {MAX_ARCHIVE_BYTES:,}: split it"
        )
    packed = max(1, sum(info.compress_size for info in infos))
    if unpacked > RATIO_FREE_BYTES and unpacked / packed > MAX_RATIO:
        raise LiveryError(
            f"{source}: unpacks to {unpacked // packed} times its size, which pictures never do: "
            "it looks like a zip bomb; give the folder instead"
        )


def _unsafe(info: zipfile.ZipInfo) -> str | None:
    """Why this entry of a zip is left alone."""
    path = PurePosixPath(info.filename.replace("\\", "/"))
    if not path.parts or path.is_absolute() or ".." in path.parts or ":" in path.parts[0]:
        return "has a name that leads out of the zip"
    if stat.S_ISLNK(info.external_attr >> 16):
        return "is a link: put the file itself into the zip"
    if info.flag_bits & 1:
        return "is encrypted: zip it again without a password"
    return None


def _bounded(file: IO[bytes], limit: int | None) -> bytes:
    if limit is not None:
        return file.read(limit)
    content = file.read(MAX_FILE_BYTES + 1)
    if len(content) > MAX_FILE_BYTES:
        raise Unreadable(f"is larger than {MAX_FILE_BYTES >> 20} MiB")
    return content
