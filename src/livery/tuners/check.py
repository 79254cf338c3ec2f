"""What a file means against what it was made from: the change of every weight, compared."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from livery.nouns import Checked, LiveryError
from livery.tuners.delta import Layer, deltas
from livery.tuners.formats.content import Content

DTYPES: Mapping[str, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
ROUNDING: Mapping[str, float] = {"fp32": 1e-5, "fp16": 1e-2, "bf16": 8e-2}
"""Largest difference that passes, as a share of a layer's largest change: a few roundings of its factors."""


def compare(
    path: Path,
    form: str,
    found: Mapping[str, Layer],
    vectors: Mapping[tuple[str, str], Tensor],
    read: Content,
    weights: Mapping[str, Tensor],
    dtype: str = "fp32",
) -> Checked:
    """What a file holds against what it was made from. Raises LiveryError when more than rounding differs."""
    if read.unmatched:
        raise LiveryError(
            f"{path}: not written, for {len(read.unmatched)} tensors of the file have no place when read "
            f"back, first {read.unmatched[0]}"
        )
    if strange := sorted({*read.layers, *map(str, read.words)} - {*found, *map(str, vectors)}):
        raise LiveryError(f"{path}: not written, for it also changes {strange[0]} when read back")
    worst, largest = 0.0, 0.0
    for name, change, other, size in _pairs(found, vectors, read, weights):
        difference = float((change - other).abs().max()) if change.numel() else 0.0
        if not difference <= ROUNDING[dtype] * size:
            raise LiveryError(
                f"{path}: not written, for read back it changes {name} otherwise, by {difference:.3g} where "
                f"the adapter's change is {float(change.abs().max()):.3g}; take fp32, or another format"
            )
        worst, largest = max(worst, difference), max(largest, float(change.abs().max()))
    return Checked(path=str(path), format=form, matched=read.matched, difference=worst, largest=largest)


def _pairs(
    found: Mapping[str, Layer],
    vectors: Mapping[tuple[str, str], Tensor],
    read: Content,
    weights: Mapping[str, Tensor],
) -> Iterator[tuple[str, Tensor, Tensor, float]]:
    """Each change, the file's, and the size that rounding is a share of: DoRA rounds the weight itself."""
    for name, layer in found.items():
        other = dict(deltas({name: read.layers[name]}, weights)) if name in read.layers else {}
        for param, change in deltas({name: layer}, weights):
            size = float(change.abs().max()) if change.numel() else 0.0
            if layer.needs_base:
                size += float(weights[param].float().abs().max())
            yield param, change, other.get(param, torch.zeros_like(change)), size
    for key, tensor in vectors.items():
        rows = tensor.float()
        other_rows = read.words[key].float() if key in read.words else torch.zeros_like(rows)
        yield " ".join(key), rows, other_rows, float(rows.abs().max())
