"""SDXL: two text encoders, a U-Net that is told the size and crop of pictures, a KL autoencoder.

Podell et al. 2023 (arXiv:2307.01952); section 2.2 is about size and crop.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from livery.models import parts, text, tiny
from livery.models.backbone import Conditioning, PipelineKind
from livery.models.parts import DiffusersBackbone
from livery.nouns import LiveryError

SIZES = 6
"""Numbers in `Conditioning.size`: original, crop, target; each as height, width or top, left."""


class SDXL(DiffusersBackbone):
    """A loaded SDXL base model; not the refiner, which reads an aesthetic score instead of a target size.

    The empty prompt is all zeros where the folder says `force_zeros_for_empty_prompt`, as SDXL 1.0 does: so
    was the base trained, and so does diffusers' pipeline draw without a negative prompt. Rows trained
    on no caption and rows drawn without guidance's prompt thus see the same.
    """

    family = "sdxl"
    people = "an SDXL base"
    pipelines = ("StableDiffusionXLPipeline",)
    denoiser_part = "unet"
    part_kinds: ClassVar[Mapping[str, Any]] = {
        "unet": UNet2DConditionModel,
        "vae": AutoencoderKL,
        "text_encoder": CLIPTextModel,
        "text_encoder_2": CLIPTextModelWithProjection,
    }
    tokenizer_kinds: ClassVar[Mapping[str, Any]] = {"tokenizer": CLIPTokenizer, "tokenizer_2": CLIPTokenizer}
    pipeline_kinds: ClassVar[Mapping[PipelineKind, str]] = {
        "text-to-image": "StableDiffusionXLPipeline",
        "image-to-image": "StableDiffusionXLImg2ImgPipeline",
        "inpainting": "StableDiffusionXLInpaintPipeline",
    }
    settings: ClassVar[Mapping[str, Any]] = {"force_zeros_for_empty_prompt": True}
    lora_targets = parts.UNET_TARGETS
    tower_targets = text.CLIP_TARGETS

    def __init__(
        self,
        unet: UNet2DConditionModel,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        text_encoder_2: CLIPTextModelWithProjection,
        tokenizer: CLIPTokenizer,
        tokenizer_2: CLIPTokenizer,
        scheduler: Any,
        force_zeros_for_empty_prompt: bool = True,
        where: str = "sdxl",
    ) -> None:
        """From loaded parts, which it freezes; any of diffusers' schedulers; `where` leads errors."""
        self.unet = unet
        self.force_zeros_for_empty_prompt = force_zeros_for_empty_prompt
        towers = {"text_encoder": text_encoder, "text_encoder_2": text_encoder_2}
        words = {"text_encoder": tokenizer, "text_encoder_2": tokenizer_2}
        self._assemble(unet, vae, towers, words, scheduler, where)
        _check_fit(unet, vae, text_encoder, text_encoder_2, where)
        text.pool_at_first_end(text_encoder_2, tokenizer_2)
        self.bucket_step = parts.unet_step(unet, self.latent.factor)
        self.sha256 = self._hashed(
            {
                **parts.diffusion_facts(self.noise),
                **self._word_facts(),
                "unet": {key: unet.config.get(key) for key in parts.UNET_SHAPE},
                "force_zeros_for_empty_prompt": force_zeros_for_empty_prompt,
            }
        )

    @classmethod
    def tiny(cls, seed: int = 0) -> Self:
        """Three levels with transformers of 0, 1 and 2 blocks, two resnets each, as SDXL's 0, 2 and 10."""
        with tiny.seeded(seed):
            words, words_2 = tiny.byte_tokenizer(length=16), tiny.byte_tokenizer(length=16, pad="!")
            first, second = tiny.clip_config(words, 16), tiny.clip_config(words_2, 32, projection=24)
            unet = tiny.unet(
                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
                up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
                block_out_channels=(16, 32, 32),
                layers_per_block=2,
                transformer_layers_per_block=(1, 1, 2),
                attention_head_dim=(2, 4, 4),
                cross_attention_dim=48,
                use_linear_projection=True,
                addition_embed_type="text_time",
                addition_time_embed_dim=8,
                projection_class_embeddings_input_dim=8 * SIZES + 24,
            )
            return cls(
                unet,
                tiny.vae(),
                CLIPTextModel(first),
                CLIPTextModelWithProjection(second),
                words,
                words_2,
                EulerDiscreteScheduler(**tiny.SCALED_LINEAR, timestep_spacing="leading", steps_offset=1),
            )

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """tokens [B, T, D1 + D2]: the last but one hidden states of both; pooled [B, P] of the second."""
        first, _ = self._clip("text_encoder", prompts)
        second, pooled = self._clip("text_encoder_2", prompts)
        tokens = torch.cat([first, second], dim=-1)
        if self.force_zeros_for_empty_prompt:
            empty = torch.tensor([not prompt for prompt in prompts], device=tokens.device)
            # Chosen, not left out: a batch of empty prompts alone still has a (zero) gradient.
            tokens = torch.where(empty[:, None, None], 0.0, tokens)
            pooled = torch.where(empty[:, None], 0.0, pooled)
        return Conditioning(tokens, pooled)

    def predict(self, noisy: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """Without `conditioning.size`, pictures are uncropped squares of the base's resolution."""
        size = self._whole(noisy) if conditioning.size is None else conditioning.size
        return self.unet(
            noisy,
            t,
            encoder_hidden_states=conditioning.tokens,
            added_cond_kwargs={"text_embeds": conditioning.pooled, "time_ids": size.float()},
            return_dict=False,
        )[0]

    def _whole(self, noisy: Tensor) -> Tensor:
        side = self.resolution
        return noisy.new_tensor([[side, side, 0, 0, side, side]], dtype=torch.float32).expand(len(noisy), -1)

    def _pipeline_options(self, kind: PipelineKind) -> dict[str, Any]:
        return {
            "force_zeros_for_empty_prompt": self.force_zeros_for_empty_prompt,
            "add_watermarker": False,
        }


def _check_fit(unet: Any, vae: Any, first: Any, second: Any, where: str) -> None:
    """The parts must fit together. Raises LiveryError that names both numbers."""
    parts.check_channels(unet, vae, "U-Net", where)
    width = first.config.hidden_size + second.config.hidden_size
    parts.check_width(unet.config["cross_attention_dim"], width, "U-Net", where, "both text encoders")
    if unet.config["addition_embed_type"] != "text_time":
        raise LiveryError(
            f"{where}: the U-Net reads no picture sizes (addition_embed_type): not an SDXL base"
        )
    reads = unet.config["projection_class_embeddings_input_dim"]
    writes = SIZES * unet.config["addition_time_embed_dim"] + second.config.projection_dim
    if reads != writes:
        raise LiveryError(
            f"{where}: the U-Net reads {reads} numbers of size and prompt, an SDXL base has {writes}: it is "
            "a refiner or an editing model"
        )
