"""PEFT's names with diffusers' prefixes: what `load_lora_weights` reads.

The format has no alpha of a layer: rank and alpha stand in the header as `lora_adapter_metadata`, keywords
of peft's LoraConfig by part. A reader that does not look there takes alpha = rank; for it the scale can be
folded into the second factor.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

from peft.utils.other import get_pattern_key
from torch import Tensor, nn

from livery.nouns import LiveryError
from livery.tuners.delta import MAGNITUDE, Layer
from livery.tuners.formats.content import Content, fitted
from livery.tuners.formats.names import DIFFUSERS_PARTS, clip_name, part_names

METADATA = "lora_adapter_metadata"
OLD = {
    ".lora.down.weight": ".lora_A.weight",
    ".lora.up.weight": ".lora_B.weight",
    "_lora.down.weight": ".lora_A.weight",
    "_lora.up.weight": ".lora_B.weight",
    ".lora_linear_layer.down.weight": ".lora_A.weight",
    ".lora_linear_layer.up.weight": ".lora_B.weight",
    ".lora_magnitude_vector": f".{MAGNITUDE}",
}
"""Endings of earlier versions -> today's."""
ENDINGS = (".lora_A.weight", ".lora_B.weight", f".{MAGNITUDE}")


def to_diffusers(layers: Mapping[str, Layer], family: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The file's tensors and the header that tells their alphas. Raises LiveryError for other kinds."""
    parts = part_names(DIFFUSERS_PARTS, family)
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        if layer.kind != "lora":
            raise LiveryError(
                f"diffusers loads plain LoRA only, {name} is {layer.kind}: give a rank to make it a LoRA"
            )
        part, _, module = name.partition(".")
        theirs = f"{parts[part]}.{module if part == 'denoiser' else clip_name(module)}"
        tensors |= {f"{theirs}.{leaf}": tensor for leaf, tensor in layer.leaves.items()}
    return tensors, {METADATA: json.dumps(lora_metadata(layers, family), sort_keys=True)}


def folded(layer: Layer) -> Layer:
    """The same change with scale 1: the scale is in the second factor."""
    if layer.scale == 1:
        return layer
    return Layer(layer.kind, layer.leaves | {"lora_B.weight": layer.leaves["lora_B.weight"] * layer.scale})


def lora_metadata(layers: Mapping[str, Layer], family: str) -> dict[str, Any]:
    """Keywords of peft's LoraConfig for each part that the file touches: "unet.r", "unet.lora_alpha" ...

    The usual rank and alpha, and patterns for layers that have others. rsLoRA is told as the alpha that gives
    the same product.
    """
    parts = part_names(DIFFUSERS_PARTS, family)
    told: dict[str, Any] = {}
    for part, theirs in parts.items():
        mine = {n.removeprefix(f"{part}."): layer for n, layer in layers.items() if n.startswith(f"{part}.")}
        if not mine:
            continue
        ranks = {name: layer.rank for name, layer in mine.items()}
        alphas = {name: neat(layer.scale * layer.rank) for name, layer in mine.items()}
        rank, alpha = (Counter(each.values()).most_common(1)[0][0] for each in (ranks, alphas))
        dora = {layer.is_dora for layer in mine.values()}
        if len(dora) > 1:
            raise LiveryError(
                f"{part}: some layers are DoRA and some are not, which diffusers cannot read: give a rank"
            )
        settings: dict[str, Any] = {"r": rank, "lora_alpha": alpha, "target_modules": sorted(mine)}
        settings |= {"rank_pattern": _others(ranks, rank), "alpha_pattern": _others(alphas, alpha)}
        settings["use_dora"] = dora == {True}
        always = ("r", "lora_alpha", "target_modules")
        told |= {f"{theirs}.{key}": v for key, v in settings.items() if v or key in always}
    return told


def _others(values: Mapping[str, float], usual: float) -> dict[str, float]:
    return {f"^{name}": value for name, value in values.items() if value != usual}


def neat(value: float) -> float:
    """Without the last digits of a division that was undone: 7.499999999999999 -> 7.5."""
    return float(f"{value:.12g}")


def from_diffusers(
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    family: str,
    modules: Mapping[str, nn.Linear | nn.Conv2d],
) -> Content:
    """What such a file changes in a base with these layers; older endings and peft's own prefix are known.

    Raises LiveryError when factors are missing or of another base.
    """
    names = _names(family, modules)
    found: dict[str, dict[str, Tensor]] = {}
    alphas: dict[str, float] = {}
    unmatched: list[str] = []
    for key, tensor in tensors.items():
        name, leaf = _split(key)
        if name not in names or not leaf:
            unmatched.append(key)
        elif leaf == "alpha":
            alphas[names[name]] = float(tensor.float())
        else:
            found.setdefault(names[name], {})[leaf] = tensor
    told = _told(metadata)
    layers: dict[str, Layer] = {}
    for name, leaves in found.items():
        if not {"lora_A.weight", "lora_B.weight"} <= leaves.keys():
            raise LiveryError(f"{name} lacks one of its two factors; get the file again")
        layer = Layer("lora", leaves)
        part, _, module = name.partition(".")
        scale = _scale(told.get(part_names(DIFFUSERS_PARTS, family)[part], {}), module, layer.rank)
        if name in alphas:
            scale = alphas[name] / layer.rank
        layers[name] = fitted(name, Layer("lora", leaves, scale), modules[name])
    return Content(layers, matched=len(tensors) - len(unmatched), unmatched=tuple(unmatched))


def _names(family: str, modules: Mapping[str, nn.Linear | nn.Conv2d]) -> dict[str, str]:
    """Every name that a file may give a layer -> ours."""
    parts = part_names(DIFFUSERS_PARTS, family)
    names: dict[str, str] = {}
    for layer in modules:
        part, _, module = layer.partition(".")
        if part in parts:
            names[f"{parts[part]}.{module}"] = names[f"{parts[part]}.{clip_name(module)}"] = layer
            if part == "denoiser":
                names[module] = layer  # as peft itself writes it, without a part
    return names


def _split(key: str) -> tuple[str, str]:
    """A tensor's name -> layer and leaf, in today's words; no leaf for what is none."""
    key = key.removeprefix("base_model.model.").replace(".processor.", ".")
    for old, new in OLD.items():
        if key.endswith(old):
            key = f"{key.removesuffix(old)}{new}"
    if key.endswith(".alpha"):
        return key.removesuffix(".alpha"), "alpha"
    for ending in ENDINGS:
        if key.endswith(ending):
            name = key.removesuffix(ending)
            return (f"{name}.0" if name.endswith(".to_out") else name), ending[1:]
    return key, ""


def _told(metadata: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """The header's settings by part. Raises LiveryError when they are not JSON."""
    try:
        flat: dict[str, Any] = json.loads(metadata.get(METADATA, "{}"))
    except ValueError:
        raise LiveryError(f"the header's {METADATA} is not JSON; get the file again") from None
    told: dict[str, dict[str, Any]] = {}
    for key, value in flat.items():
        part, _, setting = key.rpartition(".")
        told.setdefault(part, {})[setting] = value
    return told


def _scale(settings: Mapping[str, Any], module: str, rank: int) -> float:
    """alpha / rank as peft would work it out; 1 where nothing is told."""
    if "lora_alpha" not in settings:
        return 1.0
    patterns: dict[str, float] = settings.get("alpha_pattern") or {}
    key = get_pattern_key(list(patterns), module)
    alpha = float(patterns[key] if key in patterns else settings["lora_alpha"])
    return alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)
