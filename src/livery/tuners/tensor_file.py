"""safetensors files of any maker: read without running anything; equal content is written as equal bytes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from livery.nouns import LiveryError

PICKLE_STARTS = (b"PK\x03\x04", b"\x80")  # torch.save writes a zip of pickles; older files are bare pickles
CONVERT = (
    'convert it where you trust it: python -c "import torch, safetensors.torch as s; '
    "t = torch.load('FILE', weights_only=True); s.save_file(t, 'FILE.safetensors')\""
)


def to_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """The file's content; tensors may lie anywhere and share memory."""
    plain = {name: tensors[name].detach().cpu().contiguous().clone() for name in sorted(tensors)}
    return _in_order(safetensors.torch.save(plain, dict(metadata)))


def content_of(path: Path) -> bytes:
    """The bytes of a safetensors file. Raises LiveryError when it cannot be read or is a pickle."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise LiveryError(f"{path}: cannot be read ({error.strerror}); give an adapter file") from None
    if content.startswith(PICKLE_STARTS) and not _plausible(content):
        raise LiveryError(
            f"{path}: a pickle, which can run code when read; livery takes adapters as safetensors only: "
            f"{CONVERT}"
        )
    return content


def tensors_of(path: Path, content: bytes) -> dict[str, Tensor]:
    """The tensors by name; `path` leads the errors. Raises LiveryError for a damaged file."""
    try:
        return safetensors.torch.load(content)
    except (SafetensorError, KeyError, ValueError) as error:
        raise LiveryError(f"{path}: damaged ({error}); get the file again") from None


def metadata_of(path: Path, content: bytes) -> dict[str, str]:
    """What the header says beside the tensors. Raises LiveryError when it is no safetensors header."""
    try:
        if not _plausible(content):
            raise ValueError("not a safetensors header")
        size = int.from_bytes(content[:8], "little")
        return json.loads(content[8 : 8 + size]).get("__metadata__", {})
    except ValueError as error:
        raise LiveryError(f"{path}: not a safetensors file, or damaged ({error}); get it again") from None


def body_of(content: bytes) -> bytes:
    """What lies behind the header: the tensors alone."""
    return content[8 + int.from_bytes(content[:8], "little") :]


def _in_order(content: bytes) -> bytes:
    """The same file with its header's keys sorted: the library writes metadata in a random order.

    Tensors lie by offsets from the header's end, so the header may be written anew: 8 bytes of length, JSON,
    spaces up to a multiple of 8.
    """
    size = int.from_bytes(content[:8], "little")
    header = json.dumps(json.loads(content[8 : 8 + size]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + content[8 + size :]


def _plausible(content: bytes) -> bool:
    """Whether it begins as a safetensors file does: a length that fits, then a JSON object."""
    size = int.from_bytes(content[:8], "little")
    return 8 + size <= len(content) and content[8:9] == b"{"
