"""The workspace: a folder of blobs named by their SHA-256, and an SQL index of nouns and aliases.

Every write is all or nothing. A blob is written under a temporary name, flushed to disk and then
renamed; a noun or an alias is one SQL transaction, begun only after its blobs are on disk. So a
process killed at any point leaves a workspace that reads well: at worst it holds a blob nobody
mentions, or a temporary file, which a later opening sweeps away.
"""

import hashlib
import io
import json
import os
import re
import time
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast

import sqlalchemy as sql
from pydantic import ValidationError
from sqlalchemy import event
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.schema import CreateIndex, CreateTable

from livery.nouns import STORED, LiveryError, Noun, first_problem, sha256_of

N = TypeVar("N", bound=Noun)

SCHEMA_VERSION = 1
CHUNK = 1 << 20  # bytes read at a time
STALE = 24 * 3600  # seconds after which an untouched temporary file belongs to a dead process

BLOB_KEYS = frozenset({"sha256", "reference", "references", "html", "mask"})
"""The fields of nouns that name blobs. Any other hash in a noun is the id of a noun, or of a base model."""

_HEX = re.compile(r"[0-9a-f]+")
_ALIAS = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,99}")
_INSERT = {"sqlite": sqlite.insert, "postgresql": postgresql.insert}

_tables = sql.MetaData()
_workspace = sql.Table("workspace", _tables, sql.Column("schema_version", sql.Integer, primary_key=True))
_nouns = sql.Table(
    "nouns",
    _tables,
    sql.Column("id", sql.String(64), primary_key=True),
    sql.Column("kind", sql.String(40), nullable=False, index=True),
    sql.Column("created", sql.DateTime(timezone=True), nullable=False),
    sql.Column("body", sql.Text, nullable=False),
)
_aliases = sql.Table(
    "aliases",
    _tables,
    sql.Column("name", sql.String(100), primary_key=True),
    sql.Column("noun_id", sql.String(64), sql.ForeignKey("nouns.id"), nullable=False),
    sql.Column("moved", sql.DateTime(timezone=True), nullable=False),
)


def default_root() -> Path:
    """The workspace of this shell: the environment's LIVERY_HOME, else `.livery` in the current directory."""
    return Path(os.environ.get("LIVERY_HOME") or ".livery")


class Store:
    """One workspace. Safe to open from several processes and threads at once.

    `root` is the folder; it is made when missing. `url` is an SQLAlchemy URL for the index, by
    default an SQLite file in the folder; a PostgreSQL URL lets several machines share one index
    over one shared folder.
    """

    def __init__(self, root: Path, url: str | None = None) -> None:
        self.root = root.absolute()
        self._blobs, self._temporary = self.root / "blobs", self.root / "tmp"
        for folder in (self._blobs, self._temporary):
            _make_folder(folder)
        self._engine = _open_index(url or f"sqlite:///{self.root / 'index.sqlite'}")
        self._sweep()

    def close(self) -> None:
        """Give the index's connections back. A closed store opens them again when it is used."""
        self._engine.dispose()

    # Blobs

    def put_blob(self, content: bytes | Path) -> str:
        """Keep these bytes, or this file's, and return their SHA-256 (64 hex digits); again is a no-op."""
        if isinstance(content, bytes):
            sha = hashlib.sha256(content).hexdigest()
            return sha if self._blob_file(sha).is_file() else self._write(io.BytesIO(content))
        try:
            with content.open("rb") as source:
                return self._write(source)
        except OSError as error:
            raise LiveryError(f"{content}: cannot be read into the workspace ({error.strerror})") from error

    def has_blob(self, sha: str) -> bool:
        """Whether the blob is in the workspace."""
        return self._blob_file(sha).is_file()

    def blob_path(self, sha: str) -> Path:
        """The file that holds a blob, for readers that want a path. It is read-only: never write to it."""
        path = self._blob_file(sha)
        if not path.is_file():
            raise LiveryError(
                f"blob {sha[:12]} is not in the workspace {self.root}: make again what mentions it"
            )
        return path

    def read_blob(self, sha: str, *, verify: bool = True) -> bytes:
        """A blob's bytes. `verify` compares them with their name, which finds out a damaged disk."""
        content = self.blob_path(sha).read_bytes()
        if verify and hashlib.sha256(content).hexdigest() != sha:
            raise LiveryError(
                f"{self._blob_file(sha)}: damaged, its content is not what its name says: delete it"
            )
        return content

    def _blob_file(self, sha: str) -> Path:
        if len(sha) != 64 or not _HEX.fullmatch(sha):
            raise LiveryError(f"{sha!r} is not the name of a blob: 64 hex digits are")
        return self._blobs / sha[:2] / sha[2:4] / sha

    def _write(self, source: BinaryIO) -> str:
        """Copy a stream into the workspace under the hash of what was in fact copied."""
        temporary = self._temporary / uuid.uuid4().hex
        try:
            sha = _copy(source, temporary)
            final = self._blob_file(sha)
            if not final.is_file():
                _make_folder(final.parent)
                temporary.replace(final)
                _flush_folder(final.parent)
            return sha
        finally:
            temporary.unlink(missing_ok=True)

    def _sweep(self) -> None:
        """Delete temporary files that a killed process left behind."""
        for path in self._temporary.iterdir():
            try:
                if time.time() - path.stat().st_mtime > STALE:
                    path.unlink()
            except FileNotFoundError:  # another process swept it, or has just finished it
                continue

    # Nouns

    def put(self, noun: Noun) -> str:
        """Keep a noun and return its id; again is a no-op. Every blob it mentions must be there already."""
        if _kind(type(noun)) not in STORED:
            raise LiveryError(f"a {_kind(type(noun))} is not kept by itself: {', '.join(STORED)} are")
        for sha in sorted(blobs_of(noun)):
            if not self.has_blob(sha):
                raise LiveryError(
                    f"{_kind(type(noun))} {noun.id[:12]} mentions blob {sha[:12]}: store that first"
                )
        row = {
            "id": noun.id,
            "kind": _kind(type(noun)),
            "created": datetime.now(UTC),
            "body": noun.model_dump_json(),
        }
        with self._engine.begin() as connection:
            connection.execute(self._insert(_nouns).values(row).on_conflict_do_nothing())
        return noun.id

    def get(self, kind: type[N], reference: str) -> N:
        """The noun of this kind with this id, unambiguous beginning of an id (4 digits or more) or alias."""
        noun_id = self._aliased(reference) or self._complete(reference, kind)
        noun = self._read(noun_id)
        if not isinstance(noun, kind):
            raise LiveryError(f"{reference} is a {_kind(type(noun))}, not a {_kind(kind)}")
        return noun

    def find(self, reference: str) -> Noun:
        """Like `get`, of whatever kind."""
        return self._read(self._aliased(reference) or self._complete(reference))

    def list(self, kind: type[N]) -> tuple[N, ...]:
        """All nouns of one kind, newest first."""
        query = (
            sql.select(_nouns.c.body).where(_nouns.c.kind == _kind(kind)).order_by(_nouns.c.created.desc())
        )
        with self._engine.connect() as connection:
            return tuple(kind.model_validate_json(body) for body in connection.scalars(query))

    def _read(self, noun_id: str) -> Noun:
        with self._engine.connect() as connection:
            row = connection.execute(
                sql.select(_nouns.c.kind, _nouns.c.body).where(_nouns.c.id == noun_id)
            ).one()
        return _parse(*row)

    def _complete(self, prefix: str, kind: type[Noun] | None = None) -> str:
        """The one id that begins with the prefix."""
        what = _kind(kind) if kind else "noun"
        if len(prefix) < 4 or not _HEX.fullmatch(prefix):
            raise LiveryError(f"no {what} is called {prefix!r}: give an alias, or 4 or more digits of an id")
        query = sql.select(_nouns.c.id).where(_nouns.c.id.startswith(prefix)).order_by(_nouns.c.id).limit(5)
        if kind:
            query = query.where(_nouns.c.kind == _kind(kind))
        with self._engine.connect() as connection:
            found = [str(noun_id) for noun_id in connection.scalars(query)]
        if not found:
            raise LiveryError(f"no {what} in {self.root} has an id that begins with {prefix}")
        if len(found) > 1:
            some = ", ".join(noun_id[:12] for noun_id in found)
            raise LiveryError(
                f"more than one {what} has an id that begins with {prefix} ({some}): give more digits"
            )
        return found[0]

    # Aliases

    def alias(self, name: str, reference: str) -> str:
        """Let a name such as "acme@prod" mean this noun from now on, in one step; returns the noun's id."""
        if not _ALIAS.fullmatch(name) or (len(name) == 64 and _HEX.fullmatch(name)):
            raise LiveryError(
                f"{name!r} cannot be an alias: use up to 100 letters, digits and . _ @ -, not an id"
            )
        noun_id = self._aliased(reference) or self._complete(reference)
        target = {"noun_id": noun_id, "moved": datetime.now(UTC)}
        move = self._insert(_aliases).values(name=name, **target)
        with self._engine.begin() as connection:
            connection.execute(move.on_conflict_do_update(index_elements=["name"], set_=target))
        return noun_id

    def aliases(self) -> dict[str, str]:
        """Every alias and the id of the noun it means, by name."""
        query = sql.select(_aliases.c.name, _aliases.c.noun_id).order_by(_aliases.c.name)
        with self._engine.connect() as connection:
            return {row.name: row.noun_id for row in connection.execute(query)}

    def _aliased(self, name: str) -> str | None:
        with self._engine.connect() as connection:
            return connection.scalar(sql.select(_aliases.c.noun_id).where(_aliases.c.name == name))

    # The whole

    def run_folder(self, run_id: str) -> Path:
        """The folder of one training run's checkpoints; made when missing."""
        if not _ALIAS.fullmatch(run_id):
            raise LiveryError(f"{run_id!r} cannot name a run's folder: use letters, digits and . _ @ -")
        return _make_folder(self.root / "runs" / run_id)

    def verify(self) -> Iterator[str]:
        """Read everything and yield one sentence for each thing that is wrong; nothing means all is well."""
        for path in sorted(self._blobs.glob("*/*/*")):
            with path.open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != path.name:
                    yield f"{path}: damaged, its content is not what its name says"
        with self._engine.connect() as connection:
            rows = connection.execute(sql.select(_nouns.c.id, _nouns.c.kind, _nouns.c.body)).all()
        for noun_id, kind, body in rows:
            yield from self._wrong_with(noun_id, kind, body)

    def _wrong_with(self, noun_id: str, kind: str, body: str) -> Iterator[str]:
        try:
            noun = _parse(kind, body)
        except LiveryError as error:
            yield f"{kind} {noun_id[:12]}: {error}"
            return
        if sha256_of(json.loads(body)) != noun_id:  # a noun of an older version is brought to today's keys
            yield f"{kind} {noun_id[:12]}: damaged, its content is not what its id says"
        for sha in blobs_of(noun):
            if not self.has_blob(sha):
                yield f"{kind} {noun_id[:12]}: blob {sha[:12]} is missing"

    def _insert(self, table: sql.Table) -> sqlite.Insert | postgresql.Insert:
        return _INSERT[self._engine.dialect.name](table)


def blobs_of(noun: Noun) -> set[str]:
    """Every blob that a noun mentions, however deep."""
    return set(_blobs_in(noun.model_dump(mode="json")))


def _blobs_in(value: Any, key: str = "") -> Iterator[str]:
    if isinstance(value, dict):
        for name, inner in cast(dict[str, Any], value).items():
            yield from _blobs_in(inner, name)
    elif isinstance(value, list):
        for inner in cast(list[Any], value):
            yield from _blobs_in(inner, key)
    elif key in BLOB_KEYS and value:
        yield str(value)


def _kind(kind: type[Noun]) -> str:
    return kind.__name__


def _parse(kind: str, body: str) -> Noun:
    """A stored row as the noun it was. Raises LiveryError when this livery cannot read it."""
    if kind not in STORED:
        raise LiveryError(f"this version of livery knows no {kind}: a newer one made it")
    try:
        return STORED[kind].model_validate_json(body)
    except ValidationError as error:
        raise LiveryError(f"this version of livery cannot read it: {first_problem(error)}") from error


def _copy(source: BinaryIO, target: Path) -> str:
    """Write a stream to a new read-only file, flush it to disk, and return the SHA-256 of what it holds."""
    digest = hashlib.sha256()
    with open(target, "xb", opener=lambda path, flags: os.open(path, flags, 0o444)) as file:
        while chunk := source.read(CHUNK):
            digest.update(chunk)
            file.write(chunk)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def _make_folder(folder: Path) -> Path:
    """Make a folder and those above it, each flushed, so that no crash loses what is put in it later."""
    if not folder.is_dir():
        _make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        _flush_folder(folder.parent)
    return folder


def _flush_folder(folder: Path) -> None:
    if os.name == "nt":  # Windows opens no folders; there a rename is durable by itself
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _open_index(url: str) -> sql.Engine:
    """Connect to the index and make its tables when they are missing, whoever else may be doing the same."""
    if (kind := sql.make_url(url).get_backend_name()) not in _INSERT:
        raise LiveryError(f"the index cannot live in {kind}: give an sqlite or a postgresql URL")
    engine = sql.create_engine(url)
    if kind == "sqlite":
        event.listen(engine, "connect", _tune_sqlite)
    with engine.begin() as connection:
        for table in _tables.sorted_tables:
            connection.execute(CreateTable(table, if_not_exists=True))
            for index in table.indexes:
                connection.execute(CreateIndex(index, if_not_exists=True))
        version = _INSERT[kind](_workspace).values(schema_version=SCHEMA_VERSION)
        if connection.scalar(sql.select(sql.func.count()).select_from(_workspace)) == 0:
            connection.execute(version.on_conflict_do_nothing())
        found = connection.scalar(sql.select(sql.func.max(_workspace.c.schema_version)))
    if found != SCHEMA_VERSION:
        raise LiveryError(
            f"{engine.url}: made by another version of livery (schema {found}, not {SCHEMA_VERSION})"
        )
    return engine


def _tune_sqlite(connection: DBAPIConnection, _record: object) -> None:
    """Wait for other writers, let readers read while one writes, and hold foreign keys true."""
    cursor = connection.cursor()
    for pragma in ("busy_timeout=30000", "journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()
