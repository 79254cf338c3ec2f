"""The nearest change of a given rank: truncated singular values (Eckart and Young 1936), with what is kept.

Sizes are squared Frobenius norms: a kept share of 0.99 is a relative error of sqrt(0.01) = 10%.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from livery.nouns import Reduced
from livery.tuners.delta import Layer, delta

EXACT_SIDE = 1536
"""Up to this smaller side all singular values are computed; above, the largest ones by random projection."""


@dataclass(frozen=True)
class Lowered:
    """One layer at a lower rank, and the sizes of what it was and of what is left."""

    layer: Layer
    size: float
    kept: float


def reduced(
    found: Mapping[str, Layer], rank: int, weights: Mapping[str, Tensor] | None = None
) -> tuple[dict[str, Layer], Reduced]:
    """Every layer as plain LoRA of at most this rank, scale 1, and how much each kept.

    A LoRA of no higher rank stays as it is. Full layers keep what a LoRA can hold, their matrices.
    `weights` are the base's, for DoRA, OFT and full.
    """
    lowered: dict[str, Lowered] = {}
    left_out: dict[str, float] = {}
    for name, layer in found.items():
        if layer.kind == "full":
            for leaf, tensor in layer.leaves.items():
                change = tensor.float() - (weights or {})[f"{name}.{leaf}"].to(tensor.device).float()
                if leaf == "weight" and change.ndim in (2, 4):
                    lowered[name] = lower(change, rank)
                else:
                    left_out[f"{name}.{leaf}"] = float(change.square().sum())
        elif layer.kind == "lora" and not layer.is_dora:
            lowered[name] = _lower_lora(layer, rank)
        else:
            lowered[name] = lower(delta(name, layer, weights), rank)
    changed = {name: each for name, each in lowered.items() if each.size}
    return {name: each.layer for name, each in changed.items()}, told(changed, rank, left_out)


def told(lowered: Mapping[str, Lowered], rank: int, left_out: Mapping[str, float]) -> Reduced:
    """What was kept, by layer and in all; what could not be held counts as lost."""
    total = sum(each.size for each in lowered.values()) + sum(left_out.values())
    kept = sum(each.kept for each in lowered.values())
    return Reduced(
        rank=rank,
        kept=_share(kept, total),
        layers={name: _share(each.kept, each.size) for name, each in lowered.items()},
        left_out=tuple(sorted(name for name, size in left_out.items() if size)),
    )


def _share(part: float, whole: float) -> float:
    return min(1.0, part / whole) if whole else 1.0


@torch.no_grad()
def lower(change: Tensor, rank: int) -> Lowered:
    """A dense change [out, in] or [out, in, h, w] as LoRA factors of at most this rank."""
    flat = change.float().flatten(1)
    rank = min(rank, *flat.shape)
    if min(flat.shape) <= EXACT_SIDE:
        u, s, vh = torch.linalg.svd(flat, full_matrices=False)
        u, s, vh = u[:, :rank], s[:rank], vh[:rank]
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            u, s, v = torch.svd_lowrank(flat, q=min(rank + 16, *flat.shape), niter=6)
        u, s, vh = u[:, :rank], s[:rank], v[:, :rank].T
    return Lowered(_layer(u, s, vh, change.shape), float(flat.square().sum()), float(s.square().sum()))


@torch.no_grad()
def _lower_lora(layer: Layer, rank: int) -> Lowered:
    """Through the small matrix between the factors' orthogonal bases: exact, and no dense product."""
    down, up = layer.leaves["lora_A.weight"].float(), layer.leaves["lora_B.weight"].float()
    left, inner_left = torch.linalg.qr(up.flatten(1) * layer.scale)
    right, inner_right = torch.linalg.qr(down.flatten(1).T)
    u, s, vh = torch.linalg.svd(inner_left @ inner_right.T, full_matrices=False)
    size = float(s.square().sum())
    if down.shape[0] <= rank:
        return Lowered(layer, size, size)
    u, s, vh = left @ u[:, :rank], s[:rank], vh[:rank] @ right.T
    shape = torch.Size((up.shape[0], *down.shape[1:]))
    return Lowered(_layer(u, s, vh, shape), size, float(s.square().sum()))


def _layer(u: Tensor, s: Tensor, vh: Tensor, shape: torch.Size) -> Layer:
    """Both factors get the root of the singular values, as large as each other."""
    kernel = [1] * (len(shape) - 2)
    root = s.clamp(min=0).sqrt()
    down = (root[:, None] * vh).reshape(len(s), *shape[1:]).contiguous()
    up = (u * root).reshape(shape[0], len(s), *kernel).contiguous()
    return Layer("lora", {"lora_A.weight": down, "lora_B.weight": up})
