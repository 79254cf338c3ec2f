"""What an adapter file holds, whoever wrote it, in livery's own terms."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from livery.nouns import LiveryError, Reduced
from livery.tuners.delta import MAGNITUDE, Layer


@dataclass(frozen=True)
class Content:
    """Changed layers and new words by livery's names, and which tensors of the file they came from."""

    layers: dict[str, Layer] = field(default_factory=dict)
    words: dict[tuple[str, str], Tensor] = field(default_factory=dict)
    matched: int = 0
    unmatched: tuple[str, ...] = ()
    reduced: Reduced | None = None
    """What a rank that was asked for kept of it."""


def fitted(name: str, layer: Layer, module: nn.Linear | nn.Conv2d) -> Layer:
    """LoRA factors in the shapes that this layer takes: others write 1 x 1 convolutions as matrices.

    Raises LiveryError when the sizes are of another base model.
    """
    if layer.kind != "lora":
        return layer
    down, up = layer.leaves["lora_A.weight"], layer.leaves["lora_B.weight"]
    shape = module.weight.shape
    kernel = [1] * (len(shape) - 2)
    if down[0].numel() != shape[1:].numel() or up.shape[0] != shape[0] or up[0].numel() != down.shape[0]:
        raise LiveryError(
            f"{name} is {list(shape)} in this base, but the file's factors are {list(up.shape)} and "
            f"{list(down.shape)}: it was made for another base model"
        )
    leaves = {
        "lora_A.weight": down.reshape(down.shape[0], *shape[1:]),
        "lora_B.weight": up.reshape(shape[0], down.shape[0], *kernel),
    }
    if layer.is_dora:
        magnitude = layer.leaves[MAGNITUDE]
        if magnitude.numel() != shape[0]:
            raise LiveryError(
                f"{name}: its DoRA lengths are over inputs ({list(magnitude.shape)}), livery's are over "
                "outputs; use a file whose lengths are over outputs, or the same adapter without DoRA"
            )
        leaves[MAGNITUDE] = magnitude.reshape(1, -1, *kernel) if kernel else magnitude.reshape(-1)
    return Layer("lora", leaves, layer.scale)


# ------------------------------------------------------------------ fused layers

STACKED = ("lora_A.weight", "hada_w1_b", "hada_w2_b")
BLOCKS = ("lora_B.weight", "hada_w1_a", "hada_w2_a")
SCALED = ("lora_B.weight", "hada_w1_a")


def fuse(name: str, parts: list[Layer | None]) -> Layer:
    """Several layers as the one that others keep in their place, rows one below the other, exactly.

    First factors lie one below the other, second ones along a diagonal; what is not adapted has rows of
    zeros. One scale is left: a layer of another scale has the difference in its second factor.
    Raises LiveryError for LoKr, which has no such form, and for several kinds.
    """
    there = [part for part in parts if part is not None]
    first = there[0]
    if {part.kind for part in there} - {"lora", "loha"} or len({part.kind for part in there}) > 1:
        raise LiveryError(
            f"{name} is one layer in this format, of which the adapter changes parts as {first.kind}: give a "
            "rank to bring it to plain LoRA"
        )
    if first.is_dora and len(there) < len(parts):
        raise LiveryError(
            f"{name} is one layer in this format, of which the adapter turns only a part (DoRA): give a rank"
        )
    leaves: dict[str, Tensor] = {}
    for leaf in first.leaves:
        if leaf in STACKED:
            leaves[leaf] = torch.cat([part.leaves[leaf] for part in there])
        elif leaf in BLOCKS:
            leaves[leaf] = _diagonal(leaf, parts, first)
        elif leaf == MAGNITUDE:
            leaves[leaf] = torch.cat([part.leaves[leaf].flatten() for part in there])
        else:
            raise LiveryError(f"{name} is one layer in this format, and {leaf} cannot be joined: give a rank")
    return Layer(first.kind, leaves, first.scale)


def _diagonal(leaf: str, parts: list[Layer | None], first: Layer) -> Tensor:
    """The layers' second factors along a diagonal: [sum of rows, sum of ranks]."""
    rows = first.leaves[leaf].shape[0]
    blocks: list[Tensor] = []
    for part in parts:
        if part is None:
            blocks.append(first.leaves[leaf].new_zeros(rows, 0))
        elif leaf in SCALED and part.scale != first.scale:
            blocks.append(part.leaves[leaf] * (part.scale / first.scale))
        else:
            blocks.append(part.leaves[leaf])
    return torch.block_diag(*blocks)


def halves_swapped(name: str, layer: Layer) -> Layer:
    """The same change of a layer whose halves lie the other way round; its own reverse.

    Raises LiveryError for LoKr, whose factors cross the halves.
    """
    if layer.kind == "lokr":
        raise LiveryError(f"{name} lies the other way round in this format, as LoKr cannot: give a rank")
    leaves = {
        leaf: torch.cat([*reversed(tensor.flatten().chunk(2) if leaf == MAGNITUDE else tensor.chunk(2))])
        if leaf in (*BLOCKS, MAGNITUDE)
        else tensor
        for leaf, tensor in layer.leaves.items()
    }
    return Layer(layer.kind, leaves, layer.scale)


def split_fused(layer: Layer, count: int) -> list[Layer | None]:
    """The reverse of `fuse`, for files of any maker; none where nothing changes.

    Where second factors lie along a diagonal each part gets its own rank; otherwise all share the first
    factors, as in files that were trained on the fused layer.
    """
    columns = _columns(layer, count)
    parts: list[Layer | None] = []
    for index, own in enumerate(columns):
        if not own:
            parts.append(None)
            continue
        leaves = {leaf: _slice(leaf, tensor, index, count, own) for leaf, tensor in layer.leaves.items()}
        parts.append(Layer(layer.kind, leaves, layer.scale))
    return parts


def _slice(leaf: str, tensor: Tensor, index: int, count: int, own: list[int]) -> Tensor:
    if leaf in STACKED:
        return tensor[own].contiguous()
    rows = tensor.flatten().chunk(count) if leaf == MAGNITUDE else tensor.chunk(count)
    return rows[index].contiguous() if leaf == MAGNITUDE else rows[index][:, own].contiguous()


def _columns(layer: Layer, count: int) -> list[list[int]]:
    """Which columns of the second factors each part uses."""
    blocks = [layer.leaves[leaf] for leaf in BLOCKS if leaf in layer.leaves]
    rank = blocks[0].shape[1]
    used = torch.stack(
        [torch.stack([(part != 0).any(0) for part in block.flatten(1).chunk(count)]) for block in blocks]
    ).any(0)
    if rank % count == 0:
        owner = torch.arange(rank) // (rank // count)
        if not used[owner != torch.arange(count)[:, None]].any():
            return [torch.nonzero(owner == index).flatten().tolist() for index in range(count)]
    if (used.sum(0) > 1).any():
        return [list(range(rank)) if used[index].any() else [] for index in range(count)]
    return [torch.nonzero(used[index]).flatten().tolist() for index in range(count)]
