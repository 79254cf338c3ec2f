"""Weight files of unknown origin: told apart by content, their header checked before anything is read.

Only safetensors is read: a pickle can run code. And written, one tensor in memory at a time.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from livery.files import write_chunks
from livery.nouns import LiveryError

MAX_HEADER = 100_000_000
"""Bytes; the safetensors library's own limit."""
MAX_TENSORS = 200_000

DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}

CONVERT = (
    'convert it where you trust it: python -c "import torch, safetensors.torch as s; '
    "d = torch.load('FILE', weights_only=True); "
    "d = d.get('state_dict') or d.get('string_to_param') or d; "
    "s.save_file({k: v.contiguous().clone() for k, v in d.items() if torch.is_tensor(v)}, "
    "'FILE.safetensors')\""
)
# torch.save writes a zip of pickles; older files are a bare pickle; the oldest a tar of them.
PICKLES = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
OTHERS: Mapping[bytes, str] = {
    b"GGUF": "a GGUF file, quantised for llama.cpp; get the safetensors version",
    b"version https://git-lfs": "a Git LFS pointer, not the weights; run git lfs pull",
    b"<!DOCTYPE": "a web page, not the weights; download it again",
    b"<html": "a web page, not the weights; download it again",
}


@dataclass(frozen=True)
class Stored:
    """A tensor as the header tells of it."""

    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Header:
    metadata: Mapping[str, str]
    tensors: Mapping[str, Stored]


def read_header(path: Path) -> Header:
    """Names, types and shapes, and the metadata, of a safetensors file.

    Raises LiveryError when the file cannot be read, is a pickle or something else, or lies about itself.
    """
    try:
        with path.open("rb") as file:
            start = file.read(264)
            size = int.from_bytes(start[:8], "little")
            total = path.stat().st_size
            # A header begins with a brace; eight bytes of length may look like anything.
            plausible = len(start) > 8 and start[8:9] == b"{" and size <= min(MAX_HEADER, total - 8)
            if not plausible:
                raise LiveryError(f"{path}: {_what_else(start)}")
            file.seek(8)
            text = file.read(size)
    except OSError as error:
        raise LiveryError(f"{path}: cannot be read ({error.strerror}); name a file that is there") from None
    try:
        return _checked(json.loads(text), total - 8 - size)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise LiveryError(f"{path}: damaged, its header does not fit ({error}); get it again") from None


def _what_else(start: bytes) -> str:
    if start.startswith(PICKLES) or start[257:262] == b"ustar":
        return f"a pickle, which can run code when read; {CONVERT}"
    for magic, what in OTHERS.items():
        if start.lstrip().startswith(magic):
            return what
    return "not a safetensors file, or damaged; get it again"


def _checked(header: dict[str, Any], length: int) -> Header:
    metadata = header.pop("__metadata__", {})
    if len(header) > MAX_TENSORS:
        raise ValueError(f"{len(header)} tensors")
    if not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("metadata that is not text")
    spans, tensors = [(0, 0), (length, length)], {}
    for name, told in header.items():
        dtype, shape = DTYPES.get(told["dtype"]), tuple(told["shape"])
        if dtype is None:
            raise ValueError(f"{name} is of the type {told['dtype']}")
        if any(type(side) is not int or side < 0 for side in shape):
            raise ValueError(f"{name} has the shape {shape}")
        begin, end = told["data_offsets"]
        if end - begin != prod(shape) * dtype.itemsize:
            raise ValueError(f"{name} has {end - begin} bytes")
        spans.append((begin, end))
        tensors[name] = Stored(dtype, shape)
    if any(one[1] != two[0] for one, two in pairwise(sorted(spans))):
        raise ValueError("tensors overlap, or there are holes or an end that is cut off")
    return Header(metadata, tensors)


@dataclass(frozen=True)
class Made:
    """A tensor to write: its type and shape, and how to get it when its turn comes."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], Tensor]


def write(path: Path, tensors: Mapping[str, Made], metadata: Mapping[str, str]) -> str:
    """A safetensors file, whole or not at all; its SHA-256. Equal content gives equal bytes."""
    digest = hashlib.sha256()

    def hashed() -> Iterator[bytes | memoryview]:
        for chunk in chunks(tensors, metadata, where=f"{path}: "):
            digest.update(chunk)
            yield chunk

    write_chunks(path, hashed())
    return digest.hexdigest()


def chunks(
    tensors: Mapping[str, Made], metadata: Mapping[str, str], where: str = ""
) -> Iterator[bytes | memoryview]:
    """The bytes of a safetensors file, a tensor at a time; `where` leads the error."""
    # Widest types first, so that every tensor lies at a multiple of its own width.
    names = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    place = 0
    for name in names:
        made = tensors[name]
        end = place + prod(made.shape) * made.dtype.itemsize
        header[name] = {
            "dtype": NAMES[made.dtype],
            "shape": list(made.shape),
            "data_offsets": [place, end],
        }
        place = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER:
        raise LiveryError(f"{where}the header would be {len(text)} bytes long; write a diffusers folder")
    yield len(text).to_bytes(8, "little") + text
    for name in names:
        made = tensors[name]
        tensor = made.make().detach().to("cpu", made.dtype).contiguous()
        assert tensor.shape == made.shape, name
        if tensor.numel():
            yield tensor.reshape(-1).view(torch.uint8).numpy().data
