"""What a base model is: three verbs and its facts. Families implement this; nothing else knows them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from livery.models.device import send
from livery.models.noise import NoiseProcess

if TYPE_CHECKING:
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

PipelineKind = Literal["text-to-image", "image-to-image", "inpainting"]


@dataclass(frozen=True)
class LatentSpec:
    """The latent space, read from the autoencoder's own configuration.

    `latents = (encoded - shift) * scale`; one latent cell covers `factor` x `factor` pixels.
    """

    channels: int
    factor: int
    scale: float
    shift: float = 0.0


@dataclass(frozen=True)
class Conditioning:
    """What prompts become. Only the family that made it looks inside.

    tokens [B, T, D]; pooled [B, P] or none; size [B, 6] (original, crop, target) or none.
    """

    tokens: Tensor
    pooled: Tensor | None = None
    size: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """The parts that are there, by name: for caches."""
        parts = {"tokens": self.tokens, "pooled": self.pooled, "size": self.size}
        return {name: part for name, part in parts.items() if part is not None}

    @classmethod
    def stack(cls, rows: Sequence[Conditioning]) -> Conditioning:
        """Join along the batch; all rows must have the same parts."""
        names = rows[0].tensors()
        return cls(**{name: torch.cat([row.tensors()[name] for row in rows]) for name in names})

    def to(self, device: torch.device | str) -> Conditioning:
        return Conditioning(**{name: send(part, device) for name, part in self.tensors().items()})


class Backbone(ABC):
    """A loaded base model.

    Weights rest frozen, in evaluation mode; a tuner unfreezes or adds what it trains.
    """

    family: ClassVar[str]
    pipelines: ClassVar[tuple[str, ...]] = ()
    """The diffusers pipeline classes, as in model_index.json, whose folders this family reads."""
    latent: LatentSpec
    noise: NoiseProcess
    denoiser: nn.Module
    vae: nn.Module
    """The autoencoder; caches name latents by its hash."""
    towers: Mapping[str, nn.Module]
    """Text encoders by name, as in the diffusers folder: {"text_encoder": ...}."""
    tokenizers: dict[str, Any]
    """By tower name; looked up at each `encode_prompts`: a tuner may put another there for a while."""
    placeholders: dict[str, str]
    """Text that `encode_prompts` replaces before tokenizing: one new word -> its several vectors' words."""
    tower_targets: str
    """Regular expression over module names of a text encoder: what a low-rank tuner adapts there."""
    lora_targets: str
    """Regular expression over module names of the denoiser: what a low-rank tuner adapts by default."""
    bucket_step: int
    """Pixels that widths and heights of training pictures must be multiples of."""
    resolution: int
    """Side in pixels of the square pictures that the base was trained on."""
    sha256: str
    """Hash of the base's weights and configuration: the identity an adapter names."""
    notes: tuple[str, ...] = ()
    """What was assumed or left out when it was loaded, one sentence each."""
    home: torch.device | None = None
    """Where it computes while parts of it wait elsewhere; none = where the denoiser is."""

    @classmethod
    @abstractmethod
    def load(cls, source: str | Path, *, device: str = "cpu", allow_network: bool = False) -> Self:
        """From a diffusers folder; from a hub id only when `allow_network`.

        Raises LiveryError when the folder is not of this family, lacks a part, or holds pickles only.
        """

    @classmethod
    @abstractmethod
    def tiny(cls, seed: int = 0) -> Self:
        """Random weights of the real classes, seconds on a CPU, no network."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write as a diffusers folder that `load` and diffusers itself read."""

    @abstractmethod
    def encode_images(self, pixels: Tensor) -> Tensor:
        """pixels [B, 3, H, W] in [-1, 1] -> latents [B, C, H/f, W/f], scaled and shifted.

        Takes the mean of the posterior, so equal pictures have equal latents.
        """

    @abstractmethod
    def decode_latents(self, latents: Tensor) -> Tensor:
        """The inverse of `encode_images`: -> pixels [B, 3, H, W] in [-1, 1]."""

    @abstractmethod
    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """One row per prompt; "" is the unconditional prompt."""

    @abstractmethod
    def predict(self, noisy: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """Noisy latents [B, C, h, w], timesteps [B] -> what `noise.target` defines, same shape."""

    @abstractmethod
    def pipeline(self, kind: PipelineKind = "text-to-image") -> DiffusionPipeline:
        """The same components in diffusers' own pipeline: no copy, so attached tuners act in it."""

    @property
    def device(self) -> torch.device:
        return self.home or next(self.denoiser.parameters()).device

    def modules(self) -> Mapping[str, nn.Module]:
        """Every trainable part by name: the denoiser as "denoiser", and the towers."""
        return {"denoiser": self.denoiser, **self.towers}
