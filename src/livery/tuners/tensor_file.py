"""safetensors files of any maker: read without running anything; equal content is written as equal bytes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from livery.models import weights_file
from livery.models.weights_file import Made
from livery.nouns import LiveryError


def to_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """The file's content; tensors may lie anywhere and share memory."""
    made = {name: Made(one.dtype, tuple(one.shape), lambda one=one: one) for name, one in tensors.items()}
    return b"".join(weights_file.chunks(made, metadata))


def content_of(path: Path) -> bytes:
    """The bytes of a safetensors file. Raises LiveryError when it cannot be read, or is no such file."""
    weights_file.read_header(path)
    return path.read_bytes()


def tensors_of(path: Path, content: bytes) -> dict[str, Tensor]:
    """The tensors by name; `path` leads the errors. Raises LiveryError for a damaged file."""
    try:
        return safetensors.torch.load(content)
    except (SafetensorError, KeyError, ValueError) as error:
        raise LiveryError(f"{path}: damaged ({error}); get the file again") from None


def metadata_of(content: bytes) -> dict[str, str]:
    """What the header says beside the tensors."""
    size = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + size]).get("__metadata__", {})


def body_of(content: bytes) -> bytes:
    """What lies behind the header: the tensors alone."""
    return content[8 + int.from_bytes(content[:8], "little") :]
