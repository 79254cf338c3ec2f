"""Stable Diffusion 1.x and 2.x: one CLIP text encoder, a U-Net with cross attention, a KL autoencoder.

Rombach et al. 2022 (arXiv:2112.10752). Every fact is read from the model's own configuration, so the small
starter, SD 1.5 and SD 2.1 (v-prediction) are the same code.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, cast

import diffusers
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from livery.models import checkpoint, noise
from livery.models.backbone import Backbone, Conditioning, LatentSpec, PipelineKind
from livery.nouns import LiveryError, sha256_of

if TYPE_CHECKING:
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

WEIGHTS = {
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
}
FILES = {"tokenizer": "tokenizer_config.json", "scheduler": "scheduler_config.json"}
FORCED = {"steps_offset": 1, "clip_sample": False}
PIPELINES: Mapping[PipelineKind, str] = {
    "text-to-image": "StableDiffusionPipeline",
    "image-to-image": "StableDiffusionImg2ImgPipeline",
    "inpainting": "StableDiffusionInpaintPipeline",
}


class SD1(Backbone):
    """A loaded SD 1.x or 2.x model, float32, frozen; bf16 is the caller's choice, through torch.autocast."""

    family = "sd1"
    pipelines = ("StableDiffusionPipeline",)
    # Attention and feed-forward projections of every transformer block. Attention alone is what diffusers'
    # trainer adapts; the feed-forward layers add capacity for texture and line, which a style is made of.
    # Convolutions of the resnets are left out: many more weights, and A1111 and diffusers differ on them.
    lora_targets = r".*\.transformer_blocks\.\d+\.(attn[12]\.to_([qkv]|out\.0)|ff\.net\.(0\.proj|2))"
    tower_targets = r"(text_model\.)?encoder\.layers\.\d+\.(self_attn\.(q|k|v|out)_proj|mlp\.fc[12])"

    def __init__(
        self,
        unet: UNet2DConditionModel,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        scheduler: Any,
        where: str = "sd1",
    ) -> None:
        """From loaded components, which it freezes; any of diffusers' schedulers; `where` leads errors."""
        _check_fit(unet, vae, text_encoder, len(tokenizer), where)
        self.denoiser = self.unet = unet
        self.vae, self.text_encoder = vae, text_encoder
        self.tokenizer, self.scheduler = tokenizer, scheduler
        self.towers = {"text_encoder": text_encoder}
        self.tokenizers = {"text_encoder": tokenizer}
        self.placeholders = {}
        for part in (unet, vae, text_encoder):
            cast(nn.Module, part).eval().requires_grad_(False)
        self.latent = _latent(vae)
        self.bucket_step = self.latent.factor * 2 ** (len(unet.config["down_block_types"]) - 1)
        self.noise = noise.from_config(scheduler.config, where=f"{where}/scheduler")
        self.resolution = int(unet.config["sample_size"]) * self.latent.factor
        # Some tokenizers state no limit (a huge number): the encoder's own positions are one.
        self.max_length = min(tokenizer.model_max_length, text_encoder.config.max_position_embeddings)
        self.sha256 = checkpoint.fingerprint({"vae": vae, **self.modules()}, self._facts())

    @classmethod
    def load(cls, source: str | Path, *, device: str = "cpu", allow_network: bool = False) -> Self:
        folder = checkpoint.find_folder(source, allow_network=allow_network)
        name = checkpoint.pipeline_name(folder)
        if name not in cls.pipelines:
            raise LiveryError(f"{folder}: a {name} folder, not an SD 1.x or 2.x one ({cls.pipelines[0]})")
        checkpoint.require_parts(folder, WEIGHTS, FILES)
        backbone = cls(
            cast(UNet2DConditionModel, _read(UNet2DConditionModel, folder, "unet")),
            cast(AutoencoderKL, _read(AutoencoderKL, folder, "vae")),
            cast(CLIPTextModel, _read(CLIPTextModel, folder, "text_encoder")),
            _read_tokenizer(folder),
            _read_scheduler(folder),
            where=str(folder),
        )
        return backbone.to(device)

    @classmethod
    def tiny(cls, seed: int = 0) -> Self:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            tokenizer = _byte_tokenizer(length=16)
            return cls(_tiny_unet(), _tiny_vae(), _tiny_text(tokenizer), tokenizer, _tiny_scheduler())

    def to(self, device: torch.device | str) -> Self:
        """Move every weight; returns itself."""
        for part in (self.vae, *self.modules().values()):
            cast(nn.Module, part).to(device)
        return self

    def save(self, folder: Path) -> None:
        """Written beside and renamed: `folder` is whole or not there. LiveryError when it holds files."""
        if folder.is_dir() and any(folder.iterdir()):
            raise LiveryError(f"{folder}: already holds files; name a new folder")
        folder.parent.mkdir(parents=True, exist_ok=True)
        beside = folder.with_name(f".{folder.name}.{os.getpid()}")
        try:
            with checkpoint.quiet():
                self.pipeline().save_pretrained(beside, safe_serialization=True)
            beside.replace(folder)
        finally:
            shutil.rmtree(beside, ignore_errors=True)

    @torch.no_grad()
    def encode_images(self, pixels: Tensor) -> Tensor:
        posterior = cast(Any, self.vae).encode(pixels.to(self.device)).latent_dist
        return (posterior.mean - self.latent.shift) * self.latent.scale

    @torch.no_grad()
    def decode_latents(self, latents: Tensor) -> Tensor:
        inner = latents.to(self.device) / self.latent.scale + self.latent.shift
        return cast(Any, self.vae).decode(inner).sample

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """tokens [B, max_length, D]: the encoder's last hidden state, padded as diffusers' pipeline pads."""
        texts = list(prompts)
        for word, words in self.placeholders.items():
            texts = [text.replace(word, words) for text in texts]
        rows = self.tokenizers["text_encoder"](
            texts,
            padding="max_length",
            truncation=True,
            max_length=self.max_length,
            return_tensors="pt",
        ).to(self.device)
        masked = getattr(self.text_encoder.config, "use_attention_mask", False)
        mask = rows["attention_mask"] if masked else None
        return Conditioning(self.text_encoder(rows["input_ids"], attention_mask=mask)[0])

    def predict(self, noisy: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        return self.unet(noisy, t, encoder_hidden_states=conditioning.tokens, return_dict=False)[0]

    def pipeline(self, kind: PipelineKind = "text-to-image") -> DiffusionPipeline:
        with checkpoint.quiet():
            kind_of_pipeline: Any = getattr(diffusers, PIPELINES[kind])
        pipe = kind_of_pipeline(
            vae=self.vae,
            text_encoder=self.text_encoder,
            tokenizer=self.tokenizers["text_encoder"],
            unet=self.unet,
            scheduler=self._own_scheduler(),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def _own_scheduler(self) -> Any:
        """A fresh one for each pipeline: schedulers hold the state of a drawing.

        With the two settings that the pipeline would force on it, with a warning, if they were otherwise.
        """
        config = dict(self.scheduler.config)
        forced = {key: value for key, value in FORCED.items() if key in config}
        return type(self.scheduler).from_config({**config, **forced})

    def _facts(self) -> dict[str, Any]:
        """What shapes the output beside the weights. Few and stable: libraries add keys to their configs."""
        law = cast(noise.Diffusion, self.noise)
        shape = ("attention_head_dim", "norm_num_groups", "act_fn", "use_linear_projection")
        return {
            "family": self.family,
            "latent": [self.latent.channels, self.latent.factor, self.latent.scale, self.latent.shift],
            "prediction": law.prediction,
            "alpha_bar": [round(float(level), 6) for level in law.alpha_bar],
            "max_length": self.max_length,
            "vocabulary": sha256_of(self.tokenizer.get_vocab()),
            "unet": {key: self.unet.config.get(key) for key in shape},
        }


def _check_fit(
    unet: UNet2DConditionModel, vae: AutoencoderKL, text: CLIPTextModel, words: int, where: str
) -> None:
    """The parts must fit together. Raises LiveryError that names both numbers."""
    if words > text.config.vocab_size:
        raise LiveryError(
            f"{where}: the tokenizer has {words} words but text_encoder knows {text.config.vocab_size}; "
            "they are of different models"
        )
    channels, latent = unet.config["in_channels"], vae.config["latent_channels"]
    if channels != latent:
        raise LiveryError(
            f"{where}: the U-Net takes {channels} channels but the latents have {latent}: an inpainting, "
            "depth or editing model; give a plain text-to-image model"
        )
    width, hidden = unet.config["cross_attention_dim"], text.config.hidden_size
    if width != hidden:
        raise LiveryError(f"{where}: the U-Net reads text {width} wide but text_encoder writes {hidden}")


def _latent(vae: AutoencoderKL) -> LatentSpec:
    config = vae.config
    return LatentSpec(
        channels=config["latent_channels"],
        factor=2 ** (len(config["block_out_channels"]) - 1),
        scale=config["scaling_factor"],
        shift=config.get("shift_factor") or 0.0,
    )


def _read(kind: Any, folder: Path, part: str) -> nn.Module:
    return checkpoint.read_part(kind, folder, part, WEIGHTS[part])


def _read_tokenizer(folder: Path) -> CLIPTokenizer:
    names = {path.name for path in (folder / "tokenizer").iterdir()}
    if "tokenizer.json" not in names and not {"vocab.json", "merges.txt"} <= names:
        # The library would make one that knows no word at all.
        raise LiveryError(f"{folder}: tokenizer/vocab.json and merges.txt are missing; give a whole folder")
    try:
        return CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise LiveryError(f"{folder / 'tokenizer'}: cannot be read as CLIPTokenizer: {error}") from None


def _read_scheduler(folder: Path) -> Any:
    """The scheduler of the class that the folder names, made from its configuration."""
    config = checkpoint.read_json(folder / "scheduler", FILES["scheduler"])
    name = str(config.get("_class_name", "DDPMScheduler"))
    kind = getattr(diffusers, name, None) if name.endswith("Scheduler") else None
    if kind is None:
        raise LiveryError(f"{folder / 'scheduler'}: scheduler '{name}' is not one of diffusers'")
    return kind.from_config(config)


# ------------------------------------------------------------------ the tiny model


def _byte_tokenizer(length: int) -> CLIPTokenizer:
    """A CLIP tokenizer made in code: every byte, alone and at a word's end, and no merges."""
    letters = sorted(ByteLevel.alphabet())
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: index for index, word in enumerate(words)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=length)


def _made(kind: Any, config: dict[str, Any]) -> Any:
    return kind.from_config(config)


def _tiny_unet() -> UNet2DConditionModel:
    return _made(
        UNet2DConditionModel,
        {
            "sample_size": 16,
            "in_channels": 4,
            "out_channels": 4,
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            "block_out_channels": (32, 64),
            "layers_per_block": 1,
            "norm_num_groups": 8,
            "attention_head_dim": 4,
            "cross_attention_dim": 32,
        },
    )


def _tiny_vae() -> AutoencoderKL:
    return _made(
        AutoencoderKL,
        {
            "sample_size": 32,
            "latent_channels": 4,
            "down_block_types": ("DownEncoderBlock2D",) * 2,
            "up_block_types": ("UpDecoderBlock2D",) * 2,
            "block_out_channels": (8, 16),
            "layers_per_block": 1,
            "norm_num_groups": 4,
            "scaling_factor": 0.5,
        },
    )


def _tiny_text(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=tokenizer.model_max_length,
            bos_token_id=cast(int, tokenizer.bos_token_id),
            eos_token_id=cast(int, tokenizer.eos_token_id),
            pad_token_id=cast(int, tokenizer.pad_token_id),
        )
    )


def _tiny_scheduler() -> DDPMScheduler:
    """The schedule of SD 1.x: Rombach et al. 2022, table 15."""
    return DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1
    )
