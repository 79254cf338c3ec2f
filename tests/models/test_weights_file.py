"""Weight files: what is no safetensors file is told apart by content; headers that lie are refused."""

import io
import json
import pickle
import tarfile
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from livery.models import weights_file
from livery.models.weights_file import Made, read_header, write
from livery.nouns import LiveryError


def made(tensor: torch.Tensor) -> Made:
    return Made(tensor.dtype, tuple(tensor.shape), lambda: tensor)


TENSORS = {
    "b.half": torch.arange(6, dtype=torch.float16).reshape(2, 3),
    "a.wide": torch.arange(6, dtype=torch.float32).reshape(3, 2).T,  # not contiguous
    "c.brain": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
    "d.empty": torch.empty(0),
    "e.scalar": torch.tensor(7, dtype=torch.int64),
    "f.byte": torch.tensor([True, False, True]),
}


def test_what_is_written_is_read_by_the_library(tmp_path: Path):
    path = tmp_path / "new" / "x.safetensors"
    write(path, {name: made(tensor) for name, tensor in TENSORS.items()}, {"b": "2", "a": "1"})
    read = safetensors.torch.load_file(path)
    assert set(read) == set(TENSORS)
    assert all(torch.equal(read[name], TENSORS[name]) for name in TENSORS)
    assert all(read[name].dtype == TENSORS[name].dtype for name in TENSORS)
    with safetensors.safe_open(path, framework="pt") as file:
        assert file.metadata() == {"a": "1", "b": "2"}
    header = read_header(path)
    assert header.metadata == {"a": "1", "b": "2"}
    assert header.tensors["a.wide"].shape == (2, 3)
    assert header.tensors["c.brain"].dtype == torch.bfloat16
    assert [file.name for file in path.parent.iterdir()] == ["x.safetensors"]


def test_equal_content_gives_equal_bytes(tmp_path: Path):
    one, two = tmp_path / "1", tmp_path / "2"
    write(one, {name: made(tensor) for name, tensor in TENSORS.items()}, {"b": "2", "a": "1"})
    write(two, {name: made(TENSORS[name]) for name in reversed(TENSORS)}, {"a": "1", "b": "2"})
    assert one.read_bytes() == two.read_bytes()


def test_a_file_that_the_library_wrote_is_read(tmp_path: Path):
    path = tmp_path / "x.safetensors"
    plain = {name: tensor.contiguous() for name, tensor in TENSORS.items()}
    safetensors.torch.save_file(plain, path, {"format": "pt"})
    assert {name: told.shape for name, told in read_header(path).tensors.items()} == {
        name: tuple(tensor.shape) for name, tensor in TENSORS.items()
    }


def test_a_kill_while_writing_leaves_what_was_there(tmp_path: Path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"before")

    def stop() -> torch.Tensor:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(path, {"a": made(TENSORS["a.wide"]), "z": Made(torch.float32, (1,), stop)}, {})
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]


def saved_by_torch(*, new: bool) -> bytes:
    buffer = io.BytesIO()
    torch.save({"state_dict": {"w": torch.ones(3)}}, buffer, _use_new_zipfile_serialization=new)
    return buffer.getvalue()


def tarred() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        tar.addfile(tarfile.TarInfo("storages"), io.BytesIO())
    return buffer.getvalue()


@pytest.mark.parametrize("name", ["model.ckpt", "model.safetensors", "model"])
@pytest.mark.parametrize(
    "content",
    [
        saved_by_torch(new=True),
        saved_by_torch(new=False),
        tarred(),
        *(pickle.dumps({"w": [1.0] * 50}, protocol=number) for number in (2, 3, 4, 5)),
    ],
    ids=["zip", "old", "tar", "2", "3", "4", "5"],
)
def test_pickles_are_refused_by_content_with_the_way_out(tmp_path: Path, name: str, content: bytes):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(
        LiveryError, match=r"a pickle, which can run code when read; convert it where you trust"
    ):
        read_header(path)


def test_the_way_out_works(tmp_path: Path):
    """The command that the refusal gives, on both kinds of file people have."""
    code = weights_file.CONVERT.split('"')[1]
    for content in ({"state_dict": {"w": torch.ones(2, 2).T, "n": 3}}, {"w": torch.ones(2, 2)}):
        torch.save(content, tmp_path / "FILE")
        exec(code.replace("'FILE", f"'{tmp_path}/FILE"), {})
        assert read_header(tmp_path / "FILE.safetensors").tensors["w"].shape == (2, 2)


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"", "not a safetensors file, or damaged"),
        (b"hello", "not a safetensors file, or damaged"),
        (b"GGUF" + b"\0" * 40, "a GGUF file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "run git lfs pull"),
        (b"<!DOCTYPE html><html></html>", "a web page"),
        ((1 << 60).to_bytes(8, "little") + b"{" + b" " * 20, "not a safetensors file, or damaged"),
        ((30).to_bytes(8, "little") + b'{"a":', "not a safetensors file, or damaged"),
        ((6).to_bytes(8, "little") + b'{"a":}', "damaged, its header does not fit"),
    ],
)
def test_other_files_are_named(tmp_path: Path, content: bytes, what: str):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(LiveryError, match=what):
        read_header(path)


def test_a_file_that_is_not_there(tmp_path: Path):
    with pytest.raises(LiveryError, match="cannot be read"):
        read_header(tmp_path / "nothing")


def file_of(header: dict[str, Any], data: int) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(data)


def told(shape: list[Any], begin: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("header", "data", "what"),
    [
        ({"a": told([2], 0, 8)}, 4, "cut off"),
        ({"a": told([2], 0, 8)}, 12, "cut off"),
        ({"a": told([2], 0, 8), "b": told([2], 4, 12)}, 12, "overlap"),
        ({"a": told([2], 0, 8), "b": told([2], 12, 20)}, 20, "holes"),
        ({"a": told([3], 0, 8)}, 8, "a has 8 bytes"),
        ({"a": told([-2], 0, 8)}, 8, "a has the shape"),
        ({"a": told(["2"], 0, 8)}, 8, "a has the shape"),
        ({"a": told([2], 0, 8, "Q4_0")}, 8, "a is of the type Q4_0"),
        ({"a": [1]}, 0, "damaged"),
        ({"__metadata__": {"x": 1}}, 0, "metadata that is not text"),
        ({"__metadata__": "x"}, 0, "damaged"),
    ],
)
def test_a_header_that_lies_is_refused(tmp_path: Path, header: dict[str, Any], data: int, what: str):
    path = tmp_path / "x.safetensors"
    path.write_bytes(file_of(header, data))
    with pytest.raises(LiveryError, match=what):
        read_header(path)


def test_a_header_too_long_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(weights_file, "MAX_HEADER", 100)
    with pytest.raises(LiveryError, match="write a diffusers folder"):
        write(tmp_path / "x", {}, {"a": "b" * 100})
