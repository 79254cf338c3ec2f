"""Tools on adapters: merge several into one, extract one from two base models, resize one to a lower rank.

Pure functions on `Layer`s (see `delta.layers`); the same measure, squared size kept, throughout.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from livery.models.backbone import Backbone
from livery.nouns import LiveryError, Reduced
from livery.tuners.delta import Layer, base_weights, delta
from livery.tuners.rank import Lowered, lower, reduced, told

Layers = Mapping[str, Layer]


def merge(
    items: Sequence[tuple[Layers, float]],
    rank: int | None = None,
    weights: Mapping[str, Tensor] | None = None,
) -> tuple[dict[str, Layer], Reduced | None]:
    """One LoRA whose change is the weighted sum of the adapters'.

    Without `rank`, exactly: factors side by side, ranks add up. With `rank`, the nearest of that rank, and
    what it kept. Kinds other than plain LoRA need a rank, and the base's weights where they depend on them.
    Raises LiveryError for them without one.
    """
    names = dict.fromkeys(name for found, _ in items for name in found)
    joined: dict[str, Layer] = {}
    lowered: dict[str, Lowered] = {}
    for name in names:
        parts = [(found[name], strength) for found, strength in items if name in found]
        if all(part.kind == "lora" and not part.is_dora for part, _ in parts):
            joined[name] = _side_by_side(parts)
        elif rank is None:
            raise LiveryError(
                f"{name} is changed by another kind than plain LoRA, of which sums have no rank of their "
                "own: give a rank"
            )
        elif any(part.kind == "full" for part, _ in parts):
            raise LiveryError(
                f"{name} was trained whole (kind 'full'): extract a LoRA from that adapter first, or merge "
                "into a checkpoint"
            )
        else:
            changes = [strength * delta(name, part, weights) for part, strength in parts]
            lowered[name] = lower(torch.stack(changes).sum(0), rank)
    if rank is None:
        return joined, None
    layers, report = reduced(joined, rank)
    if not lowered:
        return layers, report
    exact = {name: lower(delta(name, layer), rank) for name, layer in joined.items()}
    both = {name: each for name, each in (exact | lowered).items() if each.size}
    return {name: each.layer for name, each in both.items()}, told(both, rank, {})


def _side_by_side(parts: Sequence[tuple[Layer, float]]) -> Layer:
    """[down1; down2] and [w1 s1 up1, w2 s2 up2]: their product is the weighted sum."""
    if len(parts) == 1 and parts[0][1] == 1:
        return parts[0][0]
    down = torch.cat([part.leaves["lora_A.weight"].float() for part, _ in parts])
    up = torch.cat([part.leaves["lora_B.weight"].float() * (part.scale * w) for part, w in parts], dim=1)
    return Layer("lora", {"lora_A.weight": down, "lora_B.weight": up})


def extract(
    tuned: Backbone, base: Backbone, rank: int, *, towers: bool = True
) -> tuple[dict[str, Layer], Reduced]:
    """What one base model learnt over another, as a LoRA: SVD of each matrix's difference.

    Norms, biases and embeddings that differ cannot be in it; they are named, and count as lost. `towers`
    also takes the text encoders. Raises LiveryError when the two are not of one shape, or are equal.
    """
    if tuned.family != base.family:
        raise LiveryError(f"one model is of the family {tuned.family}, the other of {base.family}")
    before, after = base_weights(base), base_weights(tuned)
    parts = ["denoiser", *(base.towers if towers else ())]
    matrices = _matrices(base)
    lowered: dict[str, Lowered] = {}
    left_out: dict[str, float] = {}
    for name, old in before.items():
        new = after.get(name)
        if name.partition(".")[0] not in parts or not old.is_floating_point():
            continue
        if new is None or new.shape != old.shape:
            raise LiveryError(
                f"{name} is not of the same shape in both models: one is not made from the other"
            )
        change = new.float() - old.float().to(new.device)
        if not change.any():
            continue
        if name in matrices:
            lowered[name.removesuffix(".weight")] = lower(change.cpu(), rank)
        else:
            left_out[name] = float(change.square().sum())
    if not lowered:
        raise LiveryError("the two models have the same weights in every layer a LoRA can change")
    return {name: each.layer for name, each in lowered.items()}, told(lowered, rank, left_out)


def _matrices(backbone: Backbone) -> set[str]:
    return {
        f"{part}.{name}.weight"
        for part, model in backbone.modules().items()
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    }


def resize(
    found: Layers, rank: int, weights: Mapping[str, Tensor] | None = None
) -> tuple[dict[str, Layer], Reduced]:
    """Every layer brought to at most this rank, as plain LoRA, and how much each kept.

    `weights` are the base's, for DoRA, OFT and full.
    """
    return reduced(found, rank, weights)
