"""What other tools call the layers of each family: data, applied to the layers that a base really has.

The names of the original code are those of single-file checkpoints, from the same maps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

from torch import nn

from livery.models import key_maps
from livery.models.backbone import Backbone
from livery.nouns import LiveryError

DIFFUSERS_PARTS: Mapping[str, Mapping[str, str]] = {
    "sd1": {"denoiser": "unet", "text_encoder": "text_encoder"},
    "sdxl": {"denoiser": "unet", "text_encoder": "text_encoder", "text_encoder_2": "text_encoder_2"},
    "sd3": {
        "denoiser": "transformer",
        "text_encoder": "text_encoder",
        "text_encoder_2": "text_encoder_2",
        "text_encoder_3": "text_encoder_3",
    },
}
"""Family -> part -> what diffusers calls it: the first word of each tensor's name."""

DIFFUSERS_SKIPS: Mapping[str, str] = {"sd3": "text_encoder_3"}
"""Family -> the part whose LoRA diffusers' loader passes over, without a word."""

KOHYA_PARTS: Mapping[str, Mapping[str, str]] = {
    "sd1": {"denoiser": "lora_unet", "text_encoder": "lora_te"},
    "sdxl": {"denoiser": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"},
    "sd3": {
        "denoiser": "lora_unet",
        "text_encoder": "lora_te1",
        "text_encoder_2": "lora_te2",
        "text_encoder_3": "lora_te3",
    },
}

EMBEDDING_KEYS: Mapping[str, Mapping[str, str]] = {
    "sd1": {"text_encoder": "emb_params"},
    "sdxl": {"text_encoder": "clip_l", "text_encoder_2": "clip_g"},
    "sd3": {"text_encoder": "clip_l", "text_encoder_2": "clip_g", "text_encoder_3": "t5xxl"},
}
"""Family -> tower -> its vectors' name in a Textual Inversion file of A1111 and ComfyUI."""

MODEL_NAMES: Mapping[str, Mapping[str, str]] = {
    "sd1": {"kohya": "sd_v1", "modelspec": "stable-diffusion-v1"},
    "sdxl": {"kohya": "sdxl_base_v1-0", "modelspec": "stable-diffusion-xl-v1-base"},
    "sd3": {"kohya": "medium", "modelspec": "stable-diffusion-3-medium"},
}
"""What metadata call a family; `metadata.model_names` tells its versions apart."""

Places = Mapping[str, tuple[str, ...]]
"""Their name of a layer -> ours; several where theirs is fused, from the top rows down."""


def part_names(table: Mapping[str, Mapping[str, str]], family: str) -> Mapping[str, str]:
    """A family's row of a table. Raises LiveryError for a family without one."""
    if family not in table:
        raise LiveryError(f"adapters of the family '{family}' have no file format yet")
    return table[family]


def adaptable(backbone: Backbone) -> dict[str, nn.Linear | nn.Conv2d]:
    """Every layer that an adapter can change, by our name: "<part>.<module>"."""
    return {
        f"{part}.{name}": module
        for part, model in backbone.modules().items()
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    }


def kohya_places(backbone: Backbone) -> dict[str, tuple[str, ...]]:
    """kohya's names, as its own files have them, for every layer that has one."""
    parts = part_names(KOHYA_PARTS, backbone.family)
    found = dict(_original_places(backbone))
    if backbone.family == "sd1":  # kohya trains SD 1.x and 2.x on diffusers' U-Net
        found = {_flat(parts["denoiser"], layer): (layer,) for layer in _of("denoiser", backbone)}
    for tower in backbone.towers:
        if tower in parts:
            found |= {_flat(parts[tower], layer, clip_name): (layer,) for layer in _of(tower, backbone)}
    return found


def kohya_aliases(backbone: Backbone) -> dict[str, tuple[str, ...]]:
    """Those, and the other names such files come with: diffusers' or the original code's."""
    found = dict(_original_places(backbone))
    for layer in _of("denoiser", backbone):
        found[_flat("lora_unet", layer)] = found[_flat("lora_transformer", layer)] = (layer,)
    for layer in _of("text_encoder", backbone):
        found[_flat("lora_te", layer, clip_name)] = found[_flat("lora_te1", layer, clip_name)] = (layer,)
    return found | kohya_places(backbone)


def clip_name(module: str) -> str:
    """A text encoder's layer as files call it: "text_model." leads CLIP's, whatever the library does now."""
    return f"text_model.{module}" if module.startswith("encoder.layers.") else module


def swapped_layers(backbone: Backbone) -> frozenset[str]:
    """Our layers whose halves lie the other way round in the original code: SD3's last modulations."""
    ways = {key_maps.SWAPPED} if backbone.family == "sd3" else set[key_maps.Way]()
    return frozenset(layer for way, _, group in _original(backbone) if way in ways for layer in group)


def _original_places(backbone: Backbone) -> Iterator[tuple[str, tuple[str, ...]]]:
    """The denoiser's layers by their names in the original code (LDM, SGM, MMDiT)."""
    return ((theirs, group) for _, theirs, group in _original(backbone))


def _original(backbone: Backbone) -> Iterator[tuple[key_maps.Way, str, tuple[str, ...]]]:
    make = key_maps.mmdit if backbone.family == "sd3" else key_maps.unet
    names = [f"{layer.partition('.')[2]}.weight" for layer in _of("denoiser", backbone)]
    for entry in make(cast(Any, backbone.denoiser).config, names):
        ours = tuple(f"denoiser.{name.removesuffix('.weight')}" for name in entry.ours)
        yield entry.way, f"lora_unet_{entry.theirs.removesuffix('.weight').replace('.', '_')}", ours


def _of(part: str, backbone: Backbone) -> list[str]:
    return [layer for layer in adaptable(backbone) if layer.startswith(f"{part}.")]


def _flat(prefix: str, layer: str, rename: Callable[[str], str] = str) -> str:
    return f"{prefix}_{rename(layer.partition('.')[2]).replace('.', '_')}"
