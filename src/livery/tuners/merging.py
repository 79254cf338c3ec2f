"""Adapters into a base's own weights: for a while, or as a model of its own to write."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from livery.models.backbone import Backbone
from livery.models.single_file import load_single_file, save_single_file
from livery.nouns import Checked, Event, LiveryError, Written
from livery.tuners.check import DTYPES
from livery.tuners.delta import Layer, base_weights, deltas

STEP: Mapping[str, float] = {"fp32": 2**-22, "fp16": 2**-10, "bf16": 2**-7}
"""What one rounding of a weight may move it, as a share of the largest weight of its layer."""


@contextmanager
def merged(backbone: Backbone, items: Sequence[tuple[Mapping[str, Layer], float]]) -> Generator[set[str]]:
    """The base with each adapter's change added, times its weight; yields the names of what changed.

    Every change is relative to the plain base, so the order does not matter. Afterwards the base is what it
    was, bit for bit. Raises LiveryError for a layer that this base does not have.
    """
    weights = base_weights(backbone)
    total = summed(items, weights)
    before = {name: weights[name].clone() for name in total}
    try:
        with torch.no_grad():
            for name, change in total.items():
                weights[name].add_(change.to(weights[name].device))
        yield set(total)
    finally:
        with torch.no_grad():
            for name, tensor in before.items():
                weights[name].copy_(tensor)


def summed(
    items: Sequence[tuple[Mapping[str, Layer], float]], weights: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Parameter name -> the sum of the weighted changes, float32. Raises LiveryError for a strange layer."""
    total: dict[str, Tensor] = {}
    for found, strength in items:
        for name, change in deltas(found, weights):
            if name not in weights:
                raise LiveryError(f"this base model has no {name}: the adapter was made for another one")
            part = change * strength
            total[name] = total[name] + part if name in total else part
    return total


def write_merged(
    path: Path,
    backbone: Backbone,
    items: Sequence[tuple[Mapping[str, Layer], float]],
    dtype: str = "fp32",
) -> Iterator[Event]:
    """The base with the adapters' changes in its own weights, as a model of its own.

    A path that ends in .safetensors is a single file in the original layout (A1111, ComfyUI, kohya), else a
    diffusers folder. It is loaded again and its weights compared with base + change before it gets its name.
    Raises LiveryError when the path is taken, or the comparison fails.
    """
    if path.exists() and (path.is_file() or any(path.iterdir())):
        raise LiveryError(f"{path}: is there already; name a new file or folder")
    single = path.suffix == ".safetensors"
    before = {name: tensor.clone() for name, tensor in base_weights(backbone).items()}
    total = summed(items, before)
    beside = path.with_name(f".{path.stem}.{uuid.uuid4().hex[:8]}{path.suffix}")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with merged(backbone, items):
            if single:
                save_single_file(backbone, beside, DTYPES[dtype])
            else:
                backbone.save(beside)
        again = load_single_file(beside) if single else type(backbone).load(beside)
        yield _checked(path, before, total, base_weights(again), dtype if single else "fp32")
        if path.is_dir():
            path.rmdir()  # an empty one, as checked above
        beside.replace(path)
    finally:
        if beside.is_dir():
            shutil.rmtree(beside)
        else:
            beside.unlink(missing_ok=True)
    yield Written(what="checkpoint" if single else "diffusers folder", path=str(path))


def _checked(
    path: Path,
    before: Mapping[str, Tensor],
    total: Mapping[str, Tensor],
    after: Mapping[str, Tensor],
    dtype: str,
) -> Checked:
    """Every weight of the written model against base + change. Raises LiveryError when one is otherwise."""
    worst, largest = 0.0, 0.0
    for name, base in before.items():
        if name not in after:
            raise LiveryError(f"{path}: not written, for {name} is missing when it is loaded again")
        if not base.is_floating_point() or not base.numel():
            continue
        wanted = base.cpu().float() + (total[name].cpu() if name in total else 0)
        difference = float((after[name].float() - wanted).abs().max())
        if not difference <= STEP[dtype] * float(wanted.abs().max()):
            raise LiveryError(f"{path}: not written, for loaded again {name} is off by {difference:.3g}")
        worst = max(worst, difference)
        largest = max(largest, float(total[name].abs().max()) if name in total else 0.0)
    form = "checkpoint" if path.suffix == ".safetensors" else "folder"
    return Checked(path=str(path), format=form, matched=len(before), difference=worst, largest=largest)
