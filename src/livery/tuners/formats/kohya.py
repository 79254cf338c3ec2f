"""kohya's and LyCORIS' files, which A1111, Forge, ComfyUI and diffusers read.

Each layer has factors and `alpha`; readers multiply the product by alpha / rank. What rsLoRA learnt is
written with the alpha that gives the same product: alpha * sqrt(rank). A file has one alpha for all LoRA
layers, for diffusers 0.42 takes the usual one where they differ; the rest is in the second factor.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from livery.nouns import LiveryError
from livery.tuners.delta import LEAVES, MAGNITUDE, Layer
from livery.tuners.formats.content import Content, fitted, fuse, halves_swapped, split_fused
from livery.tuners.formats.diffusers_lora import neat
from livery.tuners.formats.embedding import bundled
from livery.tuners.formats.names import Places

LORA = {"lora_A.weight": "lora_down.weight", "lora_B.weight": "lora_up.weight", MAGNITUDE: "dora_scale"}
OURS = {theirs: ours for ours, theirs in LORA.items()} | {
    leaf: leaf for kind in ("loha", "lokr") for leaf in LEAVES[kind]
}
MIDDLE, ALPHA = "lora_mid.weight", "alpha"
ORIGINAL = "adaLN_modulation"
"""In the original code's names of swapped layers, and not in diffusers' names of the same ones."""


def to_kohya(layers: Mapping[str, Layer], places: Places, swapped: Collection[str] = ()) -> dict[str, Tensor]:
    """The file's tensors; `swapped` are our layers whose halves lie the other way round there.

    Raises LiveryError for what the format has no name or no form for.
    """
    placed = {layer for group in places.values() for layer in group}
    if strange := sorted(layers.keys() - placed):
        raise LiveryError(
            f"kohya's format has no name for {len(strange)} layers, first {strange[0]}: leave them out of "
            "the tuner's targets, or take another format"
        )
    layers = _with_one_alpha(layers) if all(len(group) == 1 for group in places.values()) else layers
    tensors: dict[str, Tensor] = {}
    for name, group in places.items():
        parts = [layers.get(layer) for layer in group]
        if not any(parts):
            continue
        layer = parts[0] if len(group) == 1 else fuse(name, parts)
        assert layer is not None
        tensors |= _written(name, halves_swapped(name, layer) if group[0] in swapped else layer)
    return tensors


def _with_one_alpha(layers: Mapping[str, Layer]) -> dict[str, Layer]:
    """The same changes with the usual alpha everywhere."""
    alphas = {n: neat(each.scale * each.rank) for n, each in layers.items() if each.kind == "lora"}
    usual = Counter(alphas.values()).most_common(1)[0][0] if alphas else 0.0
    same = dict(layers)
    for name, alpha in alphas.items():
        if alpha != usual:
            layer = layers[name]
            up = layer.leaves["lora_B.weight"] * (alpha / usual)
            same[name] = Layer("lora", layer.leaves | {"lora_B.weight": up}, usual / layer.rank)
    return same


def _written(name: str, layer: Layer) -> dict[str, Tensor]:
    if layer.kind not in ("lora", "loha", "lokr"):
        raise LiveryError(
            f"kohya's format has no form for kind '{layer.kind}': give a rank to make it a LoRA"
        )
    layer = _with_a_rank(layer)
    tensors = {f"{name}.{LORA.get(leaf, leaf)}": tensor for leaf, tensor in layer.leaves.items()}
    if layer.is_dora:
        ndim = layer.leaves["lora_A.weight"].ndim
        tensors[f"{name}.dora_scale"] = layer.leaves[MAGNITUDE].reshape(-1, *[1] * (ndim - 1))
    tensors[f"{name}.{ALPHA}"] = torch.tensor(layer.scale * max(layer.rank, 1), dtype=torch.float32)
    return tensors


def _with_a_rank(layer: Layer) -> Layer:
    """LoKr of two whole matrices has no rank, and readers leave its alpha alone: the scale goes inside."""
    if layer.rank or layer.scale == 1:
        return layer
    leaves = layer.leaves | {"lokr_w1": layer.leaves["lokr_w1"] * layer.scale}
    return Layer(layer.kind, leaves)


def from_kohya(
    tensors: Mapping[str, Tensor],
    places: Places,
    modules: Mapping[str, nn.Linear | nn.Conv2d],
    swapped: Collection[str] = (),
) -> Content:
    """What such a file changes in a base with these layers; `places` may hold several names for one.

    Raises LiveryError when factors are missing or of another base.
    """
    words, rest, matched = bundled(tensors)
    found: dict[str, dict[str, Tensor]] = {}
    unmatched: list[str] = []
    for key, tensor in rest.items():
        name, _, leaf = key.partition(".")
        if name in places and (leaf in OURS or leaf in (MIDDLE, ALPHA)):
            found.setdefault(name, {})[leaf] = tensor
            matched += 1
        else:
            unmatched.append(key)
    layers: dict[str, Layer] = {}
    for name, leaves in found.items():
        group, layer = places[name], _read(name, leaves)
        if group[0] in swapped and ORIGINAL in name:
            layer = halves_swapped(name, layer)
        parts = [layer] if len(group) == 1 else split_fused(layer, len(group))
        for ours, part in zip(group, parts, strict=True):
            if part is not None:
                layers[ours] = fitted(ours, part, modules[ours])
    return Content(layers, words, matched, tuple(unmatched))


def _read(name: str, leaves: Mapping[str, Tensor]) -> Layer:
    ours = {OURS[leaf]: tensor for leaf, tensor in leaves.items() if leaf in OURS}
    kind = next(
        (kind for kind in ("lokr", "loha", "lora") if any(leaf in ours for leaf in LEAVES[kind])), None
    )
    needed = {"lora": ("lora_A.weight", "lora_B.weight"), "loha": LEAVES["loha"][:4]}.get(kind or "", ())
    missing = [leaf for leaf in needed if leaf not in ours]
    if kind is None or missing:
        raise LiveryError(f"{name} lacks a factor ({', '.join(missing) or 'all'}); get the file again")
    if MIDDLE in leaves:  # a Tucker product: the middle goes into the first factor, exactly
        down = ours["lora_A.weight"].flatten(1)
        ours["lora_A.weight"] = torch.einsum("ijhw,jc->ichw", leaves[MIDDLE], down)
    rank = Layer(kind, ours).rank
    alpha = float(leaves[ALPHA].float()) if ALPHA in leaves else 0.0
    return Layer(kind, _plain(ours), alpha / rank if alpha and rank else 1.0)


def _plain(leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without Tucker cores, and LoKr's first factor whole: what livery attaches. Exact but for rounding."""
    plain = dict(leaves)
    for number in ("1", "2"):
        if (core := plain.pop(f"hada_t{number}", None)) is not None:
            outer, inner = f"hada_w{number}_a", f"hada_w{number}_b"
            plain[inner] = torch.einsum("ijhw,jc->ichw", core, plain[inner]).flatten(1)
            plain[outer] = plain[outer].T.contiguous()
    if "lokr_w1_a" in plain:
        plain["lokr_w1"] = plain.pop("lokr_w1_a") @ plain.pop("lokr_w1_b")
    if (core := plain.pop("lokr_t2", None)) is not None:
        pair = plain.pop("lokr_w2_a"), plain.pop("lokr_w2_b")
        plain["lokr_w2"] = torch.einsum("ijhw,ip,jr->prhw", core, *pair)
    return plain
