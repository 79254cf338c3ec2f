"""What other tools call the layers of each family: data, and the few rules that make names from it.

Every table is applied to the layers that a loaded base really has, so block counts are never assumed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, cast

from torch import nn

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

RESNET = {
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
UNET_ENDS = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
"""A U-Net's layers in the original code (SGM, LDM), by their names in diffusers."""

FUSED = {
    "x_block.attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "x_block.attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
    "context_block.attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
}
JOINT = {
    "attn.to_out.0": "x_block.attn.proj",
    "attn2.to_out.0": "x_block.attn2.proj",
    "attn.to_add_out": "context_block.attn.proj",
    "ff.net.0.proj": "x_block.mlp.fc1",
    "ff.net.2": "x_block.mlp.fc2",
    "ff_context.net.0.proj": "context_block.mlp.fc1",
    "ff_context.net.2": "context_block.mlp.fc2",
    "norm1.linear": "x_block.adaLN_modulation.1",
    "norm1_context.linear": "context_block.adaLN_modulation.1",
}
MMDIT_ENDS = {
    "pos_embed.proj": "x_embedder.proj",
    "context_embedder": "context_embedder",
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
    "proj_out": "final_layer.linear",
}
"""The layers of an MMDiT in the original code. Two are not there, because their rows lie in another order:
`norm_out.linear`, and `norm1_context.linear` of the last block."""

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
    found: dict[str, tuple[str, ...]] = {}
    for layer in adaptable(backbone):
        part, _, module = layer.partition(".")
        if part == "denoiser":
            original = _denoiser_name(backbone, module)
        else:
            original = clip_name(module)
        if original is not None and part in parts:
            name = f"{parts[part]}_{original.replace('.', '_')}"
            found[name] = (*found.get(name, ()), layer)
    return {name: _rows_in_order(layers) for name, layers in found.items()}


def kohya_aliases(backbone: Backbone) -> dict[str, tuple[str, ...]]:
    """Other names that such files come with: diffusers' or the original code's, whichever is not the rule."""
    found: dict[str, tuple[str, ...]] = {}
    for layer in adaptable(backbone):
        part, _, module = layer.partition(".")
        flat = module.replace(".", "_")
        if part == "denoiser":
            found[f"lora_unet_{flat}"] = found[f"lora_transformer_{flat}"] = (layer,)
            if original := _unet_name(backbone, module):
                found[f"lora_unet_{original.replace('.', '_')}"] = (layer,)
        elif part == "text_encoder":
            clip = clip_name(module).replace(".", "_")
            found[f"lora_te_{clip}"] = found[f"lora_te1_{clip}"] = (layer,)
    return found | kohya_places(backbone)


def clip_name(module: str) -> str:
    """A text encoder's layer as files call it: "text_model." leads CLIP's, whatever the library does now."""
    if module.startswith("encoder.layers."):
        return f"text_model.{module}"
    return module


def _denoiser_name(backbone: Backbone, module: str) -> str | None:
    if backbone.family == "sd1":  # kohya trains SD 1.x and 2.x on diffusers' U-Net
        return module
    return _mmdit_name(backbone, module) if backbone.family == "sd3" else _unet_name(backbone, module)


def _unet_name(backbone: Backbone, module: str) -> str | None:
    """The original code's name: blocks are counted through, each (layers and a sampler) long."""
    config = cast(Any, backbone.denoiser).config
    if "layers_per_block" not in config:
        return None
    if module in UNET_ENDS:
        return UNET_ENDS[module]
    per_block = int(config["layers_per_block"]) + 1
    if found := re.fullmatch(r"(down|up)_blocks\.(\d+)\.(resnets|attentions)\.(\d+)\.(.+)", module):
        side, block, sort, index, rest = found.groups()
        place = int(block) * per_block + int(index)
        stack, place = ("input_blocks", place + 1) if side == "down" else ("output_blocks", place)
        return f"{stack}.{place}.{_inner(sort, rest)}"
    if found := re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)", module):
        sort, index, rest = found.groups()
        place = 1 if sort == "attentions" else 2 * int(index)
        return f"middle_block.{place}.{_inner(sort, rest)[2:]}"
    if found := re.fullmatch(r"down_blocks\.(\d+)\.downsamplers\.0\.conv", module):
        return f"input_blocks.{(int(found[1]) + 1) * per_block}.0.op"
    if found := re.fullmatch(r"up_blocks\.(\d+)\.upsamplers\.0\.conv", module):
        attends = hasattr(backbone.denoiser.get_submodule(f"up_blocks.{found[1]}"), "attentions")
        return f"output_blocks.{int(found[1]) * per_block + per_block - 1}.{2 if attends else 1}.conv"
    return None


def _inner(sort: str, rest: str) -> str:
    return f"1.{rest}" if sort == "attentions" else f"0.{RESNET.get(rest, rest)}"


def _mmdit_name(backbone: Backbone, module: str) -> str | None:
    found = re.fullmatch(r"transformer_blocks\.(\d+)\.(.+)", module)
    if not found:
        return MMDIT_ENDS.get(module)
    block, rest = found.groups()
    last = int(cast(Any, backbone.denoiser).config["num_layers"]) - 1
    if rest == "norm1_context.linear" and int(block) == last:
        return None
    fused = next((name for name, layers in FUSED.items() if rest in layers), None)
    inner = fused or JOINT.get(rest)
    return None if inner is None else f"joint_blocks.{block}.{inner}"


def _rows_in_order(layers: tuple[str, ...]) -> tuple[str, ...]:
    """Fused layers lie as query, key, value, in whatever order the model names them."""
    order = [end for ends in FUSED.values() for end in ends]
    if len(layers) == 1:
        return layers
    return tuple(
        sorted(layers, key=lambda layer: next(i for i, end in enumerate(order) if layer.endswith(f".{end}")))
    )
