import hashlib
import json
import os
import sqlite3
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from livery import store as store_module
from livery.nouns import STORED, Adapter, Dataset, LiveryError, Noun, Photo, Suite, sha256_of
from livery.store import BLOB_KEYS, Store, blobs_of, default_root

NOUN_KEYS = {"id", "adapter", "base_sha256", "dataset", "embedder_sha256", "parent", "recipe", "run", "suite"}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "workspace")


def dataset(store: Store, name: str = "brand") -> Dataset:
    return Dataset(name=name, photos=(Photo(sha256=store.put_blob(name.encode()), width=1, height=1),))


# Blobs


def test_a_blob_comes_back_and_is_named_by_its_hash(store: Store) -> None:
    sha = store.put_blob(b"red")
    assert sha == hashlib.sha256(b"red").hexdigest()
    assert store.read_blob(sha) == b"red"
    assert store.blob_path(sha).read_bytes() == b"red"


def test_a_file_is_put_like_its_bytes(store: Store, tmp_path: Path) -> None:
    (tmp_path / "big").write_bytes(b"x" * (store_module.CHUNK + 1))
    assert store.put_blob(tmp_path / "big") == store.put_blob(b"x" * (store_module.CHUNK + 1))


def test_putting_again_touches_nothing(store: Store, tmp_path: Path) -> None:
    path = store.blob_path(store.put_blob(b"red"))
    before = path.stat()
    (tmp_path / "red").write_bytes(b"red")
    store.put_blob(b"red")
    store.put_blob(tmp_path / "red")
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert not list(store.root.glob("tmp/*"))


@given(content=st.binary(max_size=200))
def test_any_bytes_come_back(content: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    store = Store(tmp_path_factory.getbasetemp() / "any-bytes")
    assert store.read_blob(store.put_blob(content)) == content
    store.close()


def test_a_missing_blob_is_one_clear_sentence(store: Store) -> None:
    with pytest.raises(LiveryError, match="is not in the workspace"):
        store.read_blob("0" * 64)


@pytest.mark.parametrize("name", ["", "../../etc/passwd", "0" * 63, "G" * 64, "0" * 64 + "\n"])
def test_only_hashes_name_blobs(store: Store, name: str) -> None:
    with pytest.raises(LiveryError, match="not the name of a blob"):
        store.blob_path(name)


def test_a_missing_source_file_is_named(store: Store, tmp_path: Path) -> None:
    with pytest.raises(LiveryError, match=r"nowhere\.bin"):
        store.put_blob(tmp_path / "nowhere.bin")


def test_damage_is_found_on_reading(store: Store) -> None:
    damage(store, sha := store.put_blob(b"red"))
    assert store.read_blob(sha, verify=False) == b"rot"
    with pytest.raises(LiveryError, match="damaged"):
        store.read_blob(sha)


def damage(store: Store, sha: str) -> None:
    path = store.blob_path(sha)
    path.chmod(0o644)
    path.write_bytes(b"rot")


# Nouns


def test_a_noun_comes_back_equal(store: Store) -> None:
    noun = dataset(store)
    assert store.put(noun) == store.put(noun) == noun.id
    assert store.get(Dataset, noun.id) == store.find(noun.id[:4]) == noun
    assert store.list(Dataset) == (noun,)


def test_nouns_outlive_the_process(store: Store) -> None:
    noun = dataset(store)
    store.put(noun)
    store.close()
    assert Store(store.root).get(Dataset, noun.id) == noun


def test_the_newest_is_listed_first(store: Store) -> None:
    nouns = [dataset(store, name) for name in ("first", "second", "third")]
    for noun in nouns:
        store.put(noun)
    assert store.list(Dataset) == tuple(reversed(nouns))
    assert store.list(Suite) == ()


def test_a_noun_waits_for_its_blobs(store: Store) -> None:
    noun = Dataset(name="early", photos=(Photo(sha256="0" * 64, width=1, height=1),))
    with pytest.raises(LiveryError, match="mentions blob 000000000000"):
        store.put(noun)
    assert store.list(Dataset) == ()


def test_parts_of_nouns_are_not_stored_by_themselves(store: Store) -> None:
    with pytest.raises(LiveryError, match="a Photo is not kept by itself"):
        store.put(Photo(sha256=store.put_blob(b"red"), width=1, height=1))


@pytest.mark.parametrize(
    ("reference", "words"),
    [
        ("abcd", "no noun in .* begins with abcd"),
        ("abc", "4 or more digits"),
        ("brand@prod", "no noun is called 'brand@prod'"),
    ],
)
def test_what_is_not_there_is_said_clearly(store: Store, reference: str, words: str) -> None:
    with pytest.raises(LiveryError, match=words):
        store.find(reference)


def test_an_ambiguous_beginning_names_the_candidates(store: Store) -> None:
    ids: dict[str, str] = {}
    for number in range(10_000):  # among 65,536 beginnings two of the same come soon
        noun = Dataset(name=str(number), photos=())
        if other := ids.get(noun.id[:4]):
            break
        ids[noun.id[:4]] = noun.id
        store.put(noun)
    else:
        pytest.fail("no two ids begin alike")
    store.put(noun)
    with pytest.raises(LiveryError, match=f"more than one Dataset .*{min(noun.id, other)[:12]}"):
        store.get(Dataset, noun.id[:4])
    assert store.get(Dataset, noun.id) == noun


def test_the_wrong_kind_is_refused(store: Store) -> None:
    noun = dataset(store)
    store.alias("brand", store.put(noun))
    with pytest.raises(LiveryError, match="brand is a Dataset, not a Suite"):
        store.get(Suite, "brand")


def hashes(model: type[BaseModel], seen: set[type]) -> set[str]:
    """The names of all fields below a model that hold hashes."""
    if model in seen:
        return set()
    seen.add(model)
    found: set[str] = set()
    for name, field in model.model_fields.items():
        if "[0-9a-f]{64}" in repr((field.annotation, field.metadata)):
            found.add(name)
        for inner in models_in(field.annotation):
            found |= hashes(inner, seen)
    return found


def models_in(annotation: Any) -> set[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return {annotation}
    return {model for part in get_args(annotation) for model in models_in(part)}


def test_every_hash_in_a_noun_is_known_to_be_a_blob_or_not() -> None:
    seen: set[type] = set()
    fields = {name for kind in STORED.values() for name in hashes(kind, seen)}
    assert "sha256" in fields
    assert fields <= BLOB_KEYS | NOUN_KEYS, "say in store.BLOB_KEYS or here what the new field names"
    assert fields >= BLOB_KEYS


def test_blobs_are_found_however_deep() -> None:
    photos = tuple(Photo(sha256=digit * 64, width=1, height=1) for digit in "123")
    assert blobs_of(Dataset(name="deep", photos=photos, parent="f" * 64)) == {
        photo.sha256 for photo in photos
    }


# Aliases


def test_an_alias_moves(store: Store) -> None:
    first, second = dataset(store, "first"), dataset(store, "second")
    store.put(first)
    store.put(second)
    assert store.alias("brand@prod", first.id[:8]) == first.id
    assert store.find("brand@prod") == first
    store.alias("brand@prod", second.id)
    assert store.aliases() == {"brand@prod": second.id}
    store.alias("brand@old", "brand@prod")
    assert store.find("brand@old") == second


def test_an_alias_wins_over_the_beginning_of_an_id(store: Store) -> None:
    noun, other = dataset(store, "cafe"), dataset(store, "other")
    store.put(noun)
    store.put(other)
    store.alias(noun.id[:4], other.id)
    assert store.find(noun.id[:4]) == other


@pytest.mark.parametrize("name", ["", " ", "a b", "../up", "a/b", "@prod", "a" * 101, "0" * 64, "prod\n"])
def test_bad_aliases_are_refused(store: Store, name: str) -> None:
    noun_id = store.put(dataset(store))
    with pytest.raises(LiveryError, match="cannot be an alias"):
        store.alias(name, noun_id)


def test_an_alias_needs_something_to_mean(store: Store) -> None:
    with pytest.raises(LiveryError, match="begins with"):
        store.alias("brand", "0" * 64)


# The whole


def test_verify_tells_what_is_wrong(store: Store) -> None:
    store.put(dataset(store))
    assert list(store.verify()) == []
    damage(store, sha := store.put_blob(b"red"))
    gone = store.put_blob(b"brand")
    store.blob_path(gone).unlink()
    wrong = "\n".join(store.verify())
    assert sha in wrong
    assert f"blob {gone[:12]} is missing" in wrong


def test_rows_of_another_version_do_not_stop_verify(store: Store) -> None:
    store.put(dataset(store))
    with sqlite3.connect(store.root / "index.sqlite") as index:
        index.execute("INSERT INTO nouns VALUES ('%s', 'Hologram', '2030-01-01 00:00:00', '{}')" % ("a" * 64))
        index.execute("INSERT INTO nouns VALUES ('%s', 'Dataset', '2030-01-01 00:00:00', '{}')" % ("b" * 64))
    wrong = "\n".join(store.verify())
    assert "knows no Hologram" in wrong
    assert "cannot read it" in wrong


def test_a_workspace_of_another_schema_is_refused(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "SCHEMA_VERSION", 2)
    with pytest.raises(LiveryError, match="another version of livery"):
        Store(store.root)


def test_the_index_can_live_elsewhere(tmp_path: Path) -> None:
    store = Store(tmp_path / "workspace", f"sqlite:///{tmp_path / 'elsewhere.sqlite'}")
    store.put(dataset(store))
    assert (tmp_path / "elsewhere.sqlite").is_file()
    with pytest.raises(LiveryError, match="postgresql"):
        Store(tmp_path / "workspace", "mysql://localhost/livery")


def test_run_folders(store: Store) -> None:
    assert store.run_folder("1234").is_dir()
    with pytest.raises(LiveryError, match="cannot name a run"):
        store.run_folder("../1234")


def test_the_default_workspace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LIVERY_HOME", raising=False)
    assert default_root() == Path(".livery")
    monkeypatch.setenv("LIVERY_HOME", "/somewhere")
    assert default_root() == Path("/somewhere")


def test_old_halves_are_swept_and_young_ones_left(store: Store) -> None:
    old, young = store.root / "tmp" / "old", store.root / "tmp" / "young"
    old.touch()
    young.touch()
    past = time.time() - 2 * store_module.STALE
    os.utime(old, (past, past))
    Store(store.root)
    assert not old.exists()
    assert young.exists()


def test_many_open_and_write_one_workspace_at_once(tmp_path: Path) -> None:
    def work(number: int) -> str:
        store = Store(tmp_path / "workspace")
        noun_id = store.put(dataset(store, str(number % 4)))
        store.alias("last", noun_id)
        store.close()
        return noun_id

    with ThreadPoolExecutor(8) as pool:
        ids = set(pool.map(work, range(32)))
    store = Store(tmp_path / "workspace")
    assert {noun.id for noun in store.list(Dataset)} == ids
    assert len(ids) == 4
    assert list(store.verify()) == []


@pytest.mark.skipif(sys.platform == "win32", reason="needs fork and SIGKILL")
@pytest.mark.parametrize("write", ["blob", "blob_from_file", "noun", "alias", "open"])
def test_kill_9_leaves_the_workspace_readable(tmp_path: Path, write: str) -> None:
    """50 writers of each kind die at random moments: what they were promised is kept, nothing is broken."""
    victim = Path(__file__).with_name("store_victim.py")
    command = [sys.executable, str(victim), str(tmp_path), write, "50"]
    run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert run.returncode == 0, run.stderr
    result = json.loads(run.stdout)
    assert result["wrong"] == []
    assert result["kept"] >= 50, "the victims died before they wrote anything"
    assert not result["torch"]
    if write.startswith("blob"):
        assert result["halves"] > 5, "the kills did not fall into writes"


def test_nouns_are_frozen(store: Store) -> None:
    noun: Noun = store.find(store.put(dataset(store)))
    with pytest.raises(ValueError, match="frozen"):
        noun.name = "other"  # pyright: ignore[reportAttributeAccessIssue]


def test_an_adapter_of_an_older_livery_is_read_and_is_not_damaged(store: Store) -> None:
    """Its recipe has the keys of version 1; it keeps the id that it was stored under."""
    recipe = {"base": "starter", "warmup_steps": 7, "resolution": 96, "tuners": [{"kind": "lora", "rank": 4}]}
    card = {"recipe": recipe, "family": "sd1", "base_sha256": "0" * 64, "dataset": "0" * 64}
    body = {"sha256": store.put_blob(b"x"), "card": {**card, "livery_version": "0.1.0", "step": 3}}
    noun_id = sha256_of(body)
    with sqlite3.connect(store.root / "index.sqlite") as index:
        row = (noun_id, "Adapter", "2026-01-01 00:00:00", json.dumps(body))
        index.execute("INSERT INTO nouns VALUES (?, ?, ?, ?)", row)
    assert list(store.verify()) == []
    found = store.get(Adapter, noun_id).card.recipe
    assert (found.optimizer.warmup_steps, found.pictures.resolutions) == (7, (96,))
    with sqlite3.connect(store.root / "index.sqlite") as index:
        index.execute("UPDATE nouns SET body = ?", (json.dumps(body).replace("sd1", "sd2"),))
    assert "damaged" in "".join(store.verify())
