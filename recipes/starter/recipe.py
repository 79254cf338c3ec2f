"""The starter's recipe file, read once into plain frozen values."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Data:
    groups: list[int]
    size: int
    render: int
    seed: int
    base_styles: list[str]
    judge_styles: list[str]
    singles: int
    counts: int
    pairs: int


@dataclass(frozen=True)
class Vae:
    channels: list[int]
    latent_channels: int
    batch: int
    steps: int
    learning_rate: float
    kl_weight: float
    edge_weight: float
    decoder_steps: int
    seed: int


@dataclass(frozen=True)
class Base:
    unet_channels: list[int]
    text_width: int
    text_layers: int
    text_length: int
    vocabulary: int
    batch: int
    steps: int
    learning_rate: float
    warmup: int
    caption_dropout: float
    late: float
    late_share: float
    ema: float
    seed: int


@dataclass(frozen=True)
class Judge:
    groups: list[int]
    focus: float
    shapes: float
    seen: float
    width: int
    layers: int
    patch: int
    text_width: int
    text_layers: int
    batch: int
    steps: int
    learning_rate: float
    weight_decay: float
    held_out: float
    seed: int


@dataclass(frozen=True)
class StarterRecipe:
    data: Data
    vae: Vae
    base: Base
    judge: Judge
    build: Path  # packages, renders, checkpoints; may be deleted at any time

    @classmethod
    def read(cls, path: Path = HERE / "starter.toml", build: Path = HERE / "build") -> StarterRecipe:
        values = tomllib.loads(path.read_text())
        build.mkdir(parents=True, exist_ok=True)
        return cls(
            Data(**values["data"]),
            Vae(**values["vae"]),
            Base(**values["base"]),
            Judge(**values["judge"]),
            build,
        )
