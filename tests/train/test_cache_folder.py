"""What a cache takes on disk: counted by kind, bounded, emptied, while others read."""

import os
from pathlib import Path

import pytest
import torch

from livery.nouns import LiveryError
from livery.train.cache import TensorCache
from livery.train.cache_folder import CLASS, LIMIT, clear, limit_of, look, set_limit, shrink, size_of

MADE = 1_700_000_000


def entry(folder: Path, kind: str, name: str, size: int, used: int) -> Path:
    suffix = "png" if kind == CLASS else "safetensors"
    path = folder / kind / name[:2] / f"{name}.{suffix}"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes(size))
    os.utime(path, (MADE + used, MADE + used))
    return path


def names(folder: Path) -> set[str]:
    return {path.stem for path in folder.rglob("*.*") if path.suffix in (".safetensors", ".png")}


def test_entries_are_counted_by_kind(tmp_path: Path):
    entry(tmp_path, "latents", "aa1", 100, 0)
    entry(tmp_path, "latents", "ab1", 50, 0)
    entry(tmp_path, "prompts", "aa1", 7, 0)
    entry(tmp_path, CLASS, "aa1", 1, 0)
    (tmp_path / "aa").mkdir()
    (tmp_path / "aa" / "bb.safetensors").write_bytes(bytes(5))  # as earlier versions laid them
    state = look(tmp_path)
    assert {share.what: (share.count, share.bytes) for share in state.shares} == {
        "latents": (2, 150),
        "prompts": (1, 7),
        "class": (1, 1),
        "older": (1, 5),
    }
    assert state.bytes == 163
    assert look(tmp_path / "none").shares == ()


def test_shrinking_removes_what_was_unused_for_longest(tmp_path: Path):
    for number, used in enumerate((3, 1, 4, 2)):
        entry(tmp_path, "latents" if number % 2 else "prompts", f"n{number}", 10, used)
    entry(tmp_path, CLASS, "drawn", 10, 0)
    assert shrink(tmp_path, 25) == 20
    assert names(tmp_path) == {"n0", "n2", "drawn"}
    assert shrink(tmp_path, 0) == 0
    assert names(tmp_path) == {"drawn"}


def test_clearing_frees_everything_but_the_limit(tmp_path: Path):
    set_limit(tmp_path, 1234)
    entry(tmp_path, "latents", "aa", 10, 0)
    entry(tmp_path, CLASS, "bb", 5, 0)
    assert clear(tmp_path) == 15
    assert names(tmp_path) == set()
    assert limit_of(tmp_path) == 1234
    assert clear(tmp_path) == 0


def test_what_a_kill_left_goes_and_what_is_being_written_stays(tmp_path: Path):
    folder = tmp_path / "latents" / "aa"
    folder.mkdir(parents=True)
    old, new = folder / ".x.safetensors.1234", folder / ".y.safetensors.1234"
    old.write_bytes(b"x")
    new.write_bytes(b"y")
    os.utime(old, (MADE, MADE))
    shrink(tmp_path, 0)
    clear(tmp_path)
    assert not old.exists()
    assert new.exists()


def test_without_a_limit_of_its_own_or_with_a_damaged_one_the_default_holds(tmp_path: Path):
    assert limit_of(tmp_path) == LIMIT
    (tmp_path / "limit.json").write_text("{")
    assert limit_of(tmp_path) == LIMIT


@pytest.mark.parametrize(
    ("text", "size"),
    [("0", 0), ("512", 512), ("1k", 1024), ("1.5 MB", 1536 * 1024), ("20G", 20 << 30), ("2TiB", 2 << 40)],
)
def test_sizes_are_read(text: str, size: int):
    assert size_of(text) == size


@pytest.mark.parametrize("text", ["", "much", "-1G", "1X", "1e9", "G"])
def test_what_is_no_size_is_refused(text: str):
    with pytest.raises(LiveryError, match="is no size"):
        size_of(text)


# ------------------------------------------------------------------ a cache within its limit


def make(size: int = 1000) -> dict[str, torch.Tensor]:
    return {"x": torch.ones(size)}


def used(folder: Path, name: str) -> float:
    return next(folder.rglob(f"{name}*.safetensors")).stat().st_mtime


def test_a_cache_stays_within_its_limit_and_makes_anew_what_went(tmp_path: Path):
    set_limit(tmp_path, 10_000)  # entries take a little over 4,000 bytes
    cache, made = TensorCache(tmp_path, memory_bytes=0), []

    def fresh() -> dict[str, torch.Tensor]:
        made.append(1)
        return make()

    for _ in range(3):
        for letter in "abcdef":
            assert cache.get("latents", letter * 64, fresh)["x"].sum() == 1000
            assert look(tmp_path).bytes <= 10_000
    assert len(made) > 6


def test_reading_and_asking_keep_an_entry_young(tmp_path: Path):
    first = TensorCache(tmp_path, memory_bytes=0)
    for letter in "abc":
        first.get("latents", letter * 64, make)
        path = next(tmp_path.rglob(f"{letter}*.safetensors"))
        os.utime(path, (MADE, MADE))
    cache = TensorCache(tmp_path, memory_bytes=0)
    cache.get("latents", "b" * 64, lambda: pytest.fail("made again"))
    assert cache.has("latents", "c" * 64)
    assert used(tmp_path, "a") == MADE
    assert used(tmp_path, "b") > MADE
    assert used(tmp_path, "c") > MADE
    shrink(tmp_path, 9_000)
    assert {name[0] for name in names(tmp_path)} == {"b", "c"}


def test_a_cache_that_is_emptied_under_a_run_goes_on(tmp_path: Path):
    cache = TensorCache(tmp_path, memory_bytes=0)
    for _ in range(3):
        assert cache.get("latents", "a" * 64, make)["x"].sum() == 1000
        clear(tmp_path)
    assert not cache.has("latents", "a" * 64)
