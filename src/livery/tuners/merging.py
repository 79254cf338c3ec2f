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


Items = Sequence[tuple[Mapping[str, Layer], float]]
"""Adapters by their layers, each with the weight that its change counts with."""


@contextmanager
def merged(backbone: Backbone, items: Items) -> Generator[set[str]]:
    """The base with each adapter's change added, times its weight; yields the names of what changed.

    Every change is relative to the plain base, so the order does not matter. Afterwards the base is what it
    was, bit for bit. Raises LiveryError for a layer that this base does not have.
    """
    weights = base_weights(backbone)
    before: dict[str, Tensor] = {}
    try:
        with torch.no_grad():
            for name, change in sums(items, weights):
                before[name] = weights[name].clone()
                weights[name].add_(change.to(weights[name].device))
        yield set(before)
    finally:
        with torch.no_grad():
            for name, tensor in before.items():
                weights[name].copy_(tensor)


def sums(items: Items, weights: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Each changed parameter's name and the sum of its weighted changes, float32, layer by layer.

    Raises LiveryError for a layer that these weights do not have.
    """
    for layer in dict.fromkeys(name for found, _ in items for name in found):
        total: dict[str, Tensor] = {}
        for found, strength in items:
            if layer not in found:
                continue
            for name, change in deltas({layer: found[layer]}, weights):
                if name not in weights:
                    raise LiveryError(f"this base model has no {name}: the adapter was made for another one")
                total[name] = total[name] + change * strength if name in total else change * strength
        yield from total.items()


def write_merged(
    path: Path,
    backbone: Backbone,
    items: Items,
    dtype: str = "fp32",
) -> Iterator[Event]:
    """The base with the adapters' changes in its own weights, as a model of its own.

    A path that ends in .safetensors is a single file in the original layout (A1111, ComfyUI, kohya), else a
    diffusers folder. It is loaded again and its weights compared with base + change before it gets its name.
    Raises LiveryError when the path is taken, or the comparison fails.
    """
    if path.exists() and (path.is_file() or any(path.iterdir())):
        raise LiveryError(f"{path}: is there already; name a new file or folder")
    if not any(found for found, _ in items):
        raise LiveryError("the adapters teach words only, which a model's weights have no place for")
    single = path.suffix == ".safetensors"
    beside = path.with_name(f".{path.stem}.{uuid.uuid4().hex[:8]}{path.suffix}")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with merged(backbone, items):
            if single:
                save_single_file(backbone, beside, DTYPES[dtype])
            else:
                backbone.save(beside)
        again = load_single_file(beside) if single else type(backbone).load(beside)
        yield _checked(path, base_weights(backbone), items, base_weights(again), dtype if single else "fp32")
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
    items: Items,
    after: Mapping[str, Tensor],
    dtype: str,
) -> Checked:
    """Every weight of the written model against base + change. Raises LiveryError when one is otherwise."""
    worst, largest, left = 0.0, 0.0, dict.fromkeys(before)
    for name, change in sums(items, before):
        worst = max(worst, _difference(path, name, before[name], change, after, dtype))
        largest = max(largest, float(change.abs().max()))
        del left[name]
    for name in left:
        worst = max(worst, _difference(path, name, before[name], None, after, dtype))
    form = "checkpoint" if path.suffix == ".safetensors" else "folder"
    return Checked(path=str(path), format=form, matched=len(before), difference=worst, largest=largest)


def _difference(
    path: Path, name: str, base: Tensor, change: Tensor | None, after: Mapping[str, Tensor], dtype: str
) -> float:
    if name not in after:
        raise LiveryError(f"{path}: not written, for {name} is missing when it is loaded again")
    if not base.is_floating_point() or not base.numel():
        return 0.0
    wanted = base.cpu().float() + (0 if change is None else change.cpu())
    difference = float((after[name].cpu().float() - wanted).abs().max())
    step = max(STEP[dtype], 2 * torch.finfo(base.dtype).eps)
    if not difference <= step * float(wanted.abs().max()):
        raise LiveryError(f"{path}: not written, for loaded again {name} is off by {difference:.3g}")
    return difference
