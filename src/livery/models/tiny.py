"""Parts of the tiny models: the real classes with random weights and words made in code, no network."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTextConfig, CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer

SCALED_LINEAR = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
"""The schedule of SD 1.x, 2.x and SDXL: Rombach et al. 2022, table 15."""


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Random weights drawn inside follow the seed; the global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def byte_tokenizer(length: int, pad: str = "<|endoftext|>") -> CLIPTokenizer:
    """A CLIP tokenizer made in code: every byte, alone and at a word's end, and no merges."""
    letters = sorted(ByteLevel.alphabet())
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: index for index, word in enumerate(words)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], pad_token=pad, model_max_length=length)


def letter_tokenizer(length: int) -> T5Tokenizer:
    """A T5 tokenizer made in code: a unigram model of single letters, in the layout of the real one."""
    letters = [chr(code) for code in (*range(0x21, 0x7F), *range(0xC0, 0x100))]
    words = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *((each, -3.0) for each in letters)]
    return T5Tokenizer(vocab=words, extra_ids=0, model_max_length=length)


def clip_config(tokenizer: CLIPTokenizer, width: int = 32, projection: int = 32) -> CLIPTextConfig:
    """A CLIP text encoder of two layers."""
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=projection,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=cast(int, tokenizer.bos_token_id),
        eos_token_id=cast(int, tokenizer.eos_token_id),
        pad_token_id=cast(int, tokenizer.pad_token_id),
    )


def t5(tokenizer: T5Tokenizer, width: int) -> T5EncoderModel:
    """A T5 1.1 encoder of two layers: gated feed-forwards, as in the XXL that SD3 reads."""
    return T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=width,
            d_kv=8,
            d_ff=2 * width,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
        )
    )


def unet(**config: Any) -> UNet2DConditionModel:
    """A U-Net of latents 16 x 16 x 4; `config` says what the family has of its own."""
    common = {"sample_size": 16, "in_channels": 4, "out_channels": 4, "layers_per_block": 1}
    return made(UNet2DConditionModel, {**common, "norm_num_groups": 8, **config})


def vae(channels: int = 4, scale: float = 0.5, **config: Any) -> AutoencoderKL:
    """An autoencoder that halves each side once."""
    return made(
        AutoencoderKL,
        {
            "sample_size": 32,
            "latent_channels": channels,
            "down_block_types": ("DownEncoderBlock2D",) * 2,
            "up_block_types": ("UpDecoderBlock2D",) * 2,
            "block_out_channels": (8, 16),
            "layers_per_block": 1,
            "norm_num_groups": 4,
            "scaling_factor": scale,
            **config,
        },
    )


def made(kind: Any, config: dict[str, Any]) -> Any:
    """A part of a diffusers class; through its configuration, which types leave open."""
    return kind.from_config(config)
