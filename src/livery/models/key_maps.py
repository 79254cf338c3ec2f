"""Key maps between single-file checkpoints in their original layouts and diffusers' names.

One map per part, computed from the part's configuration, read in both directions: an `Entry` says which of
our tensors make one of theirs, and how.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from livery.nouns import LiveryError

Config = Mapping[str, Any]


@dataclass(frozen=True)
class Way:
    """How tensors of ours make one of theirs, and back."""

    join: Callable[[Sequence[Tensor]], Tensor]
    split: Callable[[Tensor, int], Sequence[Tensor]]


def _swapped(tensor: Tensor) -> Tensor:
    first, second = tensor.chunk(2)
    return torch.cat([second, first])


AS_IT_IS = Way(lambda ours: ours[0], lambda theirs, _: [theirs])
STACKED = Way(
    lambda ours: torch.cat(list(ours)), lambda theirs, n: [piece.clone() for piece in theirs.chunk(n)]
)
TRANSPOSED = Way(lambda ours: ours[0].T.contiguous(), lambda theirs, _: [theirs.T.contiguous()])
SWAPPED = Way(lambda ours: _swapped(ours[0]), lambda theirs, _: [_swapped(theirs)])
"""Halves the other way round: theirs is (shift, scale), diffusers' continuous norm has (scale, shift)."""
CONVOLVED = Way(
    lambda ours: ours[0][:, :, None, None] if ours[0].ndim == 2 else ours[0],
    lambda theirs, _: [theirs.flatten(1) if theirs.ndim > 1 else theirs],
)
"""A linear layer written as a convolution over 1 x 1."""


@dataclass(frozen=True)
class Entry:
    theirs: str
    ours: tuple[str, ...]
    way: Way = AS_IT_IS


KeyMap = Callable[[Config, Iterable[str]], Iterator[Entry]]
"""Configuration and names of a part's tensors -> its entries, without the layout's prefix."""


# ------------------------------------------------------------------ denoisers

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def unet(config: Config, names: Iterable[str]) -> Iterator[Entry]:
    """UNet2DConditionModel <-> LDM's and SGM's UNetModel: blocks numbered through, halvings among them."""
    table = {
        "conv_in": "input_blocks.0.0",
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "add_embedding.linear_1": "label_emb.0.0",
        "add_embedding.linear_2": "label_emb.0.2",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
        "mid_block.attentions.0": "middle_block.1",
        **_resnet("mid_block.resnets.0", "middle_block.0"),
        **_resnet("mid_block.resnets.1", "middle_block.2"),
        **_down_blocks(config),
        **_up_blocks(config),
    }
    return _by_prefix(table, names)


def _down_blocks(config: Config) -> dict[str, str]:
    table: dict[str, str] = {}
    kinds, number = config["down_block_types"], 1
    for i, kind in enumerate(kinds):
        for j in range(_layers(config, i)):
            table |= _resnet(f"down_blocks.{i}.resnets.{j}", f"input_blocks.{number}.0")
            if "CrossAttn" in kind:
                table[f"down_blocks.{i}.attentions.{j}"] = f"input_blocks.{number}.1"
            number += 1
        if i < len(kinds) - 1:
            table[f"down_blocks.{i}.downsamplers.0.conv"] = f"input_blocks.{number}.0.op"
            number += 1
    return table


def _up_blocks(config: Config) -> dict[str, str]:
    table: dict[str, str] = {}
    kinds, number = config["up_block_types"], 0
    for i, kind in enumerate(kinds):
        layers = _layers(config, len(kinds) - 1 - i) + 1
        for j in range(layers):
            table |= _resnet(f"up_blocks.{i}.resnets.{j}", f"output_blocks.{number}.0")
            if "CrossAttn" in kind:
                table[f"up_blocks.{i}.attentions.{j}"] = f"output_blocks.{number}.1"
            if j == layers - 1 and i < len(kinds) - 1:
                place = 2 if "CrossAttn" in kind else 1
                table[f"up_blocks.{i}.upsamplers.0.conv"] = f"output_blocks.{number}.{place}.conv"
            number += 1
    return table


def _layers(config: Config, block: int) -> int:
    layers = config["layers_per_block"]
    return layers if isinstance(layers, int) else layers[block]


def _resnet(ours: str, theirs: str) -> dict[str, str]:
    return {f"{ours}.{part}": f"{theirs}.{original}" for part, original in RESNET.items()}


MMDIT = {
    "pos_embed.pos_embed": "pos_embed",
    "pos_embed.proj": "x_embedder.proj",
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
    "context_embedder": "context_embedder",
    "proj_out": "final_layer.linear",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
}
MMDIT_BLOCK = {
    "norm1.linear": "x_block.adaLN_modulation.1",
    "norm1_context.linear": "context_block.adaLN_modulation.1",
    "attn.norm_q": "x_block.attn.ln_q",
    "attn.norm_k": "x_block.attn.ln_k",
    "attn.norm_added_q": "context_block.attn.ln_q",
    "attn.norm_added_k": "context_block.attn.ln_k",
    "attn.to_out.0": "x_block.attn.proj",
    "attn.to_add_out": "context_block.attn.proj",
    "attn2.norm_q": "x_block.attn2.ln_q",
    "attn2.norm_k": "x_block.attn2.ln_k",
    "attn2.to_out.0": "x_block.attn2.proj",
    "ff.net.0.proj": "x_block.mlp.fc1",
    "ff.net.2": "x_block.mlp.fc2",
    "ff_context.net.0.proj": "context_block.mlp.fc1",
    "ff_context.net.2": "context_block.mlp.fc2",
}
MMDIT_STACKS = {
    ("attn.to_q", "attn.to_k", "attn.to_v"): "x_block.attn.qkv",
    ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"): "context_block.attn.qkv",
    ("attn2.to_q", "attn2.to_k", "attn2.to_v"): "x_block.attn2.qkv",
}


def mmdit(config: Config, names: Iterable[str]) -> Iterator[Entry]:
    """SD3Transformer2DModel <-> Stability's MMDiT and MMDiT-X.

    The last block's text stream and the output are modulated by diffusers' AdaLayerNormContinuous.
    """
    depth = config["num_layers"]
    table, stacks = dict(MMDIT), {}
    for i in range(depth):
        ours, theirs = f"transformer_blocks.{i}", f"joint_blocks.{i}"
        table |= {f"{ours}.{part}": f"{theirs}.{original}" for part, original in MMDIT_BLOCK.items()}
        stacks |= _stack(ours, theirs, MMDIT_STACKS)
    swapped = ("norm_out.linear.", f"transformer_blocks.{depth - 1}.norm1_context.linear.")
    for entry in _by_prefix(table, names, stacks):
        yield Entry(entry.theirs, entry.ours, SWAPPED) if entry.ours[0].startswith(swapped) else entry


# ------------------------------------------------------------------ autoencoder

VAE_TOP = {
    "quant_conv": "quant_conv",
    "post_quant_conv": "post_quant_conv",
    **{
        f"{side}.{ours}": f"{side}.{theirs}"
        for side in ("encoder", "decoder")
        for ours, theirs in {
            "conv_in": "conv_in",
            "conv_out": "conv_out",
            "conv_norm_out": "norm_out",
            "mid_block.resnets.0": "mid.block_1",
            "mid_block.resnets.1": "mid.block_2",
            "mid_block.attentions.0.group_norm": "mid.attn_1.norm",
            "mid_block.attentions.0.to_q": "mid.attn_1.q",
            "mid_block.attentions.0.to_k": "mid.attn_1.k",
            "mid_block.attentions.0.to_v": "mid.attn_1.v",
            "mid_block.attentions.0.to_out.0": "mid.attn_1.proj_out",
        }.items()
    },
}


def vae(config: Config, names: Iterable[str]) -> Iterator[Entry]:
    """AutoencoderKL <-> LDM's: levels of the decoder count from the other end; attention is convolution."""
    table, levels = dict(VAE_TOP), len(config["block_out_channels"])
    for i in range(levels):
        down, up = f"decoder.up_blocks.{i}", f"decoder.up.{levels - 1 - i}"
        table |= {
            f"encoder.down_blocks.{i}.resnets": f"encoder.down.{i}.block",
            f"encoder.down_blocks.{i}.downsamplers.0": f"encoder.down.{i}.downsample",
            f"{down}.resnets": f"{up}.block",
            f"{down}.upsamplers.0": f"{up}.upsample",
        }
    for entry in _by_prefix(table, names):
        theirs = entry.theirs.replace(".conv_shortcut.", ".nin_shortcut.")
        attention = re.search(r"\.mid\.attn_1\.(q|k|v|proj_out)\.weight$", theirs)
        yield Entry(theirs, entry.ours, CONVOLVED if attention else AS_IT_IS)


# ------------------------------------------------------------------ text encoders


def clip(config: Config, names: Iterable[str]) -> Iterator[Entry]:
    """CLIPTextModel <-> the same, always within "text_model.", which transformers 5 leaves out."""
    for name in names:
        plain = name.removeprefix("text_model.")
        yield Entry(plain if plain.startswith("text_projection.") else f"text_model.{plain}", (name,))


OPENCLIP = {
    "embeddings.token_embedding": "token_embedding",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm": "ln_final",
    "text_projection.weight": "text_projection",
}
OPENCLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
OPENCLIP_STACKS = {("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"): "attn.in_proj"}


def openclip(config: Config, names: Iterable[str]) -> Iterator[Entry]:
    """CLIPTextModel <-> OpenCLIP's: one matrix for queries, keys and values; the projection transposed."""
    names = list(names)
    inside = "text_model." if any(name.startswith("text_model.") for name in names) else ""
    table = {
        ours if ours.startswith("text_projection") else inside + ours: theirs
        for ours, theirs in OPENCLIP.items()
    }
    stacks: dict[str, tuple[tuple[str, ...], str]] = {}
    for i in range(config["num_hidden_layers"]):
        ours, theirs = f"{inside}encoder.layers.{i}", f"transformer.resblocks.{i}"
        table |= {f"{ours}.{part}": f"{theirs}.{original}" for part, original in OPENCLIP_LAYER.items()}
        stacks |= _stack(ours, theirs, OPENCLIP_STACKS)
    for entry in _by_prefix(table, names, stacks):
        theirs = re.sub(r"in_proj\.(weight|bias)$", r"in_proj_\1", entry.theirs)
        yield Entry(theirs, entry.ours, TRANSPOSED if theirs == "text_projection" else entry.way)


def t5(config: Config, names: Iterable[str]) -> Iterator[Entry]:
    """T5EncoderModel as it is; its two embeddings are one."""
    for name in names:
        if name != "encoder.embed_tokens.weight":
            yield Entry(name, (name,))


# ------------------------------------------------------------------ how the maps are made


def _stack(ours: str, theirs: str, stacks: Mapping[tuple[str, ...], str]) -> dict[str, tuple[Any, str]]:
    """First module -> (all modules that are stacked, the module that they make)."""
    return {
        f"{ours}.{parts[0]}": (tuple(f"{ours}.{part}" for part in parts), f"{theirs}.{original}")
        for parts, original in stacks.items()
    }


def _by_prefix(
    table: Mapping[str, str],
    names: Iterable[str],
    stacks: Mapping[str, tuple[tuple[str, ...], str]] | None = None,
) -> Iterator[Entry]:
    """Each name by the longest prefix that the table knows. Raises LiveryError for a name without."""
    stacks = stacks or {}
    later = {module for modules, _ in stacks.values() for module in modules[1:]}
    for name in names:
        module, _, leaf = name.rpartition(".")
        if module in stacks:
            modules, theirs = stacks[module]
            yield Entry(f"{theirs}.{leaf}", tuple(f"{each}.{leaf}" for each in modules), STACKED)
        elif module not in later:
            yield Entry(_renamed(name, table), (name,))


def _renamed(name: str, table: Mapping[str, str]) -> str:
    known = name
    while known:
        if known in table:
            return table[known] + name[len(known) :]
        known = known.rpartition(".")[0]
    raise LiveryError(
        f"the weight {name} has no place in the original layout; take attached adapters off before writing, "
        "or write a diffusers folder"
    )
