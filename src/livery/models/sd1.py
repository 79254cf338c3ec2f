"""Stable Diffusion 1.x and 2.x: one CLIP text encoder, a U-Net with cross attention, a KL autoencoder.

Rombach et al. 2022 (arXiv:2112.10752). Every fact is read from the model's own configuration, so the small
starter, SD 1.5 and SD 2.1 (v-prediction) are the same code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, Self

from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from livery.models import parts, text, tiny
from livery.models.backbone import Conditioning, PipelineKind
from livery.models.parts import DiffusersBackbone

FORCED = {"steps_offset": 1, "clip_sample": False}


class SD1(DiffusersBackbone):
    """A loaded SD 1.x or 2.x model, float32, frozen; bf16 is the caller's choice, through torch.autocast."""

    family = "sd1"
    people = "an SD 1.x or 2.x"
    pipelines = ("StableDiffusionPipeline",)
    denoiser_part = "unet"
    part_kinds: ClassVar[Mapping[str, Any]] = {
        "unet": UNet2DConditionModel,
        "vae": AutoencoderKL,
        "text_encoder": CLIPTextModel,
    }
    tokenizer_kinds: ClassVar[Mapping[str, Any]] = {"tokenizer": CLIPTokenizer}
    pipeline_kinds: ClassVar[Mapping[PipelineKind, str]] = {
        "text-to-image": "StableDiffusionPipeline",
        "image-to-image": "StableDiffusionImg2ImgPipeline",
        "inpainting": "StableDiffusionInpaintPipeline",
    }
    lora_targets = parts.UNET_TARGETS
    tower_targets = text.CLIP_TARGETS

    def __init__(
        self,
        unet: UNet2DConditionModel,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        scheduler: Any,
        where: str = "sd1",
    ) -> None:
        """From loaded parts, which it freezes; any of diffusers' schedulers; `where` leads errors."""
        self.unet, self.text_encoder = unet, text_encoder
        towers, words = {"text_encoder": text_encoder}, {"text_encoder": tokenizer}
        self._assemble(unet, vae, towers, words, scheduler, where)
        parts.check_channels(unet, vae, "U-Net", where)
        width = unet.config["cross_attention_dim"]
        parts.check_width(width, text_encoder.config.hidden_size, "U-Net", where)
        self.bucket_step = parts.unet_step(unet, self.latent.factor)
        self.sha256 = self._hashed(
            {
                **parts.diffusion_facts(self.noise),
                **self._word_facts(),
                "unet": {key: unet.config.get(key) for key in parts.UNET_SHAPE},
            }
        )

    @classmethod
    def tiny(cls, seed: int = 0, prediction: Literal["epsilon", "v_prediction"] = "epsilon") -> Self:
        """The layout of SD 1.x, or with "v_prediction" that of SD 2.x: linear projections, gelu, v."""
        second = prediction == "v_prediction"
        with tiny.seeded(seed):
            words = tiny.byte_tokenizer(length=16)
            unet = tiny.unet(
                down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
                up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
                block_out_channels=(32, 64),
                attention_head_dim=(4, 8) if second else 4,
                cross_attention_dim=32,
                use_linear_projection=second,
            )
            config = tiny.clip_config(words)
            config.hidden_act = "gelu" if second else "quick_gelu"
            scheduler = DDPMScheduler(
                **tiny.SCALED_LINEAR, prediction_type=prediction, clip_sample=False, steps_offset=1
            )
            return cls(unet, tiny.vae(), CLIPTextModel(config), words, scheduler)

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """tokens [B, T, D]: the encoder's last hidden state, padded as diffusers' pipeline pads."""
        rows = self.tokenize("text_encoder", prompts)
        masked = getattr(self.text_encoder.config, "use_attention_mask", False)
        mask = rows["attention_mask"] if masked else None
        return Conditioning(self.text_encoder(rows["input_ids"], attention_mask=mask)[0])

    def predict(self, noisy: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """`conditioning.size` is not read: these models know no picture sizes."""
        return self.unet(noisy, t, encoder_hidden_states=conditioning.tokens, return_dict=False)[0]

    def _own_scheduler(self) -> Any:
        """With the two settings that the pipeline would force on it, with a warning."""
        config = dict(self.scheduler.config)
        forced = {key: value for key, value in FORCED.items() if key in config}
        return type(self.scheduler).from_config({**config, **forced})

    def _pipeline_options(self, kind: PipelineKind) -> dict[str, Any]:
        return {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
