"""Stable Diffusion 3 and 3.5: a multimodal transformer on rectified flow, two CLIP towers and T5.

Esser et al. 2024 (arXiv:2403.03206); section 4 is the architecture. SD3.5's normed queries and keys and its
second attention are read from the transformer's configuration.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, Self

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from torch import Tensor
from torch.nn.functional import pad
from transformers import CLIPTextModelWithProjection, CLIPTokenizer, T5EncoderModel, T5Tokenizer

from livery.models import parts, text, tiny
from livery.models.backbone import Conditioning, PipelineKind
from livery.models.noise import Flow
from livery.models.parts import DiffusersBackbone
from livery.nouns import LiveryError

TIMES = 1000
"""The transformer counts time from 0 to 1000, rectified flow from 0 to 1."""
CLIPS = ("text_encoder", "text_encoder_2")
T5 = "text_encoder_3"
SHAPE = ("patch_size", "num_attention_heads", "attention_head_dim", "qk_norm", "dual_attention_layers")


class SD3(DiffusersBackbone):
    """A loaded SD3 or SD3.5 model. T5 may be left out: the transformer then reads zeros in its place.

    Each tower was left out of many training steps (section 5.3), so these models draw without T5 too, in
    half the memory, with less of long prompts and of written words.
    """

    family = "sd3"
    people = "a Stable Diffusion 3"
    pipelines = ("StableDiffusion3Pipeline",)
    denoiser_part = "transformer"
    part_kinds: ClassVar[Mapping[str, Any]] = {
        "transformer": SD3Transformer2DModel,
        "vae": AutoencoderKL,
        "text_encoder": CLIPTextModelWithProjection,
        "text_encoder_2": CLIPTextModelWithProjection,
        "text_encoder_3": T5EncoderModel,
    }
    tokenizer_kinds: ClassVar[Mapping[str, Any]] = {
        "tokenizer": CLIPTokenizer,
        "tokenizer_2": CLIPTokenizer,
        "tokenizer_3": T5Tokenizer,
    }
    optional = frozenset({"text_encoder_3", "tokenizer_3"})
    pipeline_kinds: ClassVar[Mapping[PipelineKind, str]] = {
        "text-to-image": "StableDiffusion3Pipeline",
        "image-to-image": "StableDiffusion3Img2ImgPipeline",
        "inpainting": "StableDiffusion3InpaintPipeline",
    }
    # Both streams of the joint attention, pictures and text, SD3.5's second attention, and feed-forwards.
    lora_targets = (
        r"transformer_blocks\.\d+\.(attn2?\.(to_[qkv]|add_[qkv]_proj|to_out\.0|to_add_out)"
        r"|ff(_context)?\.net\.(0\.proj|2))"
    )
    tower_targets = f"{text.CLIP_TARGETS}|{text.T5_TARGETS}"

    def __init__(
        self,
        transformer: SD3Transformer2DModel,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModelWithProjection,
        text_encoder_2: CLIPTextModelWithProjection,
        tokenizer: CLIPTokenizer,
        tokenizer_2: CLIPTokenizer,
        scheduler: Any,
        text_encoder_3: T5EncoderModel | None = None,
        tokenizer_3: T5Tokenizer | None = None,
        where: str = "sd3",
    ) -> None:
        """From loaded parts, which it freezes; a scheduler of rectified flow; `where` leads errors."""
        self.transformer = transformer
        towers: dict[str, Any] = {"text_encoder": text_encoder, "text_encoder_2": text_encoder_2}
        words: dict[str, Any] = {"text_encoder": tokenizer, "text_encoder_2": tokenizer_2}
        if text_encoder_3 is not None:
            towers[T5], words[T5] = text_encoder_3, tokenizer_3
        _check_fit(transformer, vae, towers, words, where)
        self._assemble(transformer, vae, towers, words, scheduler, where)
        if not isinstance(self.noise, Flow):
            raise LiveryError(f"{where}/scheduler: {type(scheduler).__name__} is not of rectified flow")
        for name in CLIPS:
            text.pool_at_first_end(towers[name], words[name])
        self.bucket_step = self.latent.factor * transformer.config["patch_size"]
        self.sha256 = self._hashed(
            {
                **self._word_facts(),
                "prediction": "flow",
                "transformer": {key: transformer.config.get(key) for key in SHAPE},
            }
        )

    @classmethod
    def tiny(cls, seed: int = 0, version: Literal["3", "3.5"] = "3.5", t5: bool = True) -> Self:
        """Three blocks; in "3.5" the first two have a second attention, and queries and keys are normed."""
        second = version == "3.5"
        with tiny.seeded(seed):
            words, words_2 = tiny.byte_tokenizer(length=16), tiny.byte_tokenizer(length=16, pad="!")
            transformer = tiny.made(
                SD3Transformer2DModel,
                {
                    "sample_size": 16,
                    "patch_size": 2,
                    "in_channels": 16,
                    "out_channels": 16,
                    "num_layers": 3,
                    "attention_head_dim": 8,
                    "num_attention_heads": 4,
                    "caption_projection_dim": 32,
                    "joint_attention_dim": 64,
                    "pooled_projection_dim": 16 + 24,
                    "pos_embed_max_size": 32,
                    "dual_attention_layers": (0, 1) if second else (),
                    "qk_norm": "rms_norm" if second else None,
                },
            )
            parts = {
                "transformer": transformer,
                "vae": tiny.vae(
                    16, scale=1.5, shift_factor=0.0625, use_quant_conv=False, use_post_quant_conv=False
                ),
                "text_encoder": CLIPTextModelWithProjection(tiny.clip_config(words, 16, projection=16)),
                "text_encoder_2": CLIPTextModelWithProjection(tiny.clip_config(words_2, 32, projection=24)),
                "tokenizer": words,
                "tokenizer_2": words_2,
                "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0),
            }
            if t5:
                parts["tokenizer_3"] = words_3 = tiny.letter_tokenizer(length=24)
                parts["text_encoder_3"] = tiny.t5(words_3, width=64)
            return cls(**parts)

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """tokens [B, T1 + T3, D]: both CLIP towers' last but one states side by side, padded to T5's width
        with zeros, then T5's last states; pooled [B, P1 + P2] of both CLIP towers. As the paper's section 4.
        """
        first, pooled = self._clip("text_encoder", prompts)
        second, pooled_2 = self._clip("text_encoder_2", prompts)
        both = torch.cat([first, second], dim=-1)
        both = pad(both, (0, self.transformer.config["joint_attention_dim"] - both.shape[-1]))
        tokens = torch.cat([both, self._t5(prompts, like=both)], dim=1)
        return Conditioning(tokens, torch.cat([pooled, pooled_2], dim=-1))

    def _t5(self, prompts: Sequence[str], like: Tensor) -> Tensor:
        """[B, T3, D]. No mask: SD3 was trained to read the padding too, and diffusers gives none."""
        if T5 not in self.towers:
            return like.new_zeros(len(prompts), text.T5_LENGTH, like.shape[-1])
        return self.towers[T5](self.tokenize(T5, prompts)["input_ids"])[0]

    def predict(self, noisy: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """t in [0, 1]. `conditioning.size` is not read: these models know no picture sizes.

        Raises LiveryError for pictures larger than the transformer's table of positions.
        """
        config, factor = self.transformer.config, self.latent.factor
        most = config["pos_embed_max_size"] * config["patch_size"]
        if max(noisy.shape[-2:]) > most:
            height, width = (side * factor for side in noisy.shape[-2:])
            raise LiveryError(
                f"pictures of {width} x {height} pixels are too large for this base, whose sides end at "
                f"{most * factor}: set a smaller resolution in [pictures]"
            )
        return self.transformer(
            hidden_states=noisy,
            timestep=t * TIMES,
            encoder_hidden_states=conditioning.tokens,
            pooled_projections=conditioning.pooled,
            return_dict=False,
        )[0]

    def _pipeline_options(self, kind: PipelineKind) -> dict[str, Any]:
        return {} if T5 in self.towers else dict.fromkeys(self.optional)


def _check_fit(
    transformer: Any, vae: Any, towers: Mapping[str, Any], words: Mapping[str, Any], where: str
) -> None:
    """The parts must fit together. Raises LiveryError that names both numbers."""
    if T5 in towers and words[T5] is None:
        raise LiveryError(f"{where}: {T5} is there but tokenizer_3 is not; leave out both or none")
    parts.check_channels(transformer, vae, "transformer", where)
    config = transformer.config
    pooled = sum(towers[name].config.projection_dim for name in CLIPS)
    parts.check_width(config["pooled_projection_dim"], pooled, "transformer", where, "both CLIP encoders")
    if T5 in towers:
        width = towers[T5].config.d_model
        parts.check_width(config["joint_attention_dim"], width, "transformer", where, T5)
