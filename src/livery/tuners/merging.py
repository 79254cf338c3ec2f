"""Adapters into a base's own weights, for a while: as a checkpoint to write, or to measure."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from livery.models.backbone import Backbone
from livery.nouns import LiveryError
from livery.tuners.delta import Layer, base_weights, deltas


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
