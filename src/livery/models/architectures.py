"""The base models that people train, as shapes: published configurations that ship with livery.

With them a single-file checkpoint can be read offline, a run's size can be known before any weight is
there, and a speed can be measured on random weights of the true shapes. `configs/NAME.json` holds what the
model's diffusers folder says in its config.json files; tests hold parameter counts against published ones.
"""

from __future__ import annotations

import importlib.resources
import json
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cache
from typing import Any, cast

import diffusers
import torch
import transformers
from accelerate import init_empty_weights
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor, nn

from livery import plugins
from livery.models.backbone import Backbone
from livery.models.clip_vocabulary import clip_tokenizer
from livery.nouns import LiveryError, unknown_key

NAMES = ("sd1.5", "sd2.1", "sd2.1-base", "sdxl", "sd3-medium", "sd3.5-medium", "sd3.5-large")
DENOISERS = ("unet", "transformer")
"""What diffusers' folders call the denoiser."""

CLASSES: Mapping[str, Any] = {
    "AutoencoderKL": AutoencoderKL,
    "SD3Transformer2DModel": SD3Transformer2DModel,
    "UNet2DConditionModel": UNet2DConditionModel,
    "CLIPTextModel": transformers.CLIPTextModel,
    "CLIPTextModelWithProjection": transformers.CLIPTextModelWithProjection,
    "T5EncoderModel": transformers.T5EncoderModel,
}
"""The only classes that a configuration may name: files come from strangers."""


@dataclass(frozen=True)
class Architecture:
    """A base model without its weights.

    `parts` maps what diffusers calls a part ("unet", "vae", "text_encoder", "tokenizer", "scheduler", ...) to
    its configuration, with the class under "_class_name". `layout` names the key maps of single files;
    `settings` is what the family takes beside the parts.
    """

    title: str
    family: str
    layout: str
    parts: Mapping[str, Mapping[str, Any]]
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def modules(self) -> tuple[str, ...]:
        """The parts that have weights."""
        return tuple(part for part, config in self.parts.items() if config.get("_class_name") in CLASSES)


def architecture(name: str) -> Architecture:
    """One of NAMES. Raises LiveryError with the nearest name."""
    if name not in NAMES:
        raise LiveryError(f"architecture: {unknown_key(name, list(NAMES))}")
    return _shipped(name)


def of_family(family: str) -> tuple[str, ...]:
    """The names of a family's architectures."""
    return tuple(name for name in NAMES if architecture(name).family == family)


def meta_parts(name: str) -> dict[str, nn.Module]:
    """Every part with weights, on the meta device: true shapes, no memory, milliseconds.

    Keys as `Backbone.modules` has them, "denoiser" and the text encoders, and "vae".
    """
    shapes = architecture(name)
    with torch.device("meta"):
        return {
            "denoiser" if part in DENOISERS else part: build(shapes.parts[part], part)
            for part in shapes.modules
        }


def random_backbone(
    name: str,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    without: tuple[str, ...] = ("text_encoder_3",),
) -> Backbone:
    """A backbone with the true shapes and random weights, for measuring speed and memory.

    `without` leaves parts out: T5 of SD3 by default, for it has 4.8 billion weights and no tokenizer ships.
    """
    shapes = architecture(name)
    generator = torch.Generator(device).manual_seed(seed)
    parts: dict[str, Any] = {}
    for part, config in shapes.parts.items():
        if part in without:
            continue
        if part in shapes.modules:
            with empty_weights():
                module = build(config, part)
            parts[part] = _fill(module, torch.device(device), dtype, generator)
        else:
            parts[part] = build_other(config, part)
    return cast(Any, assemble(shapes.family, parts, where=name)).to(device)


def build(config: Mapping[str, Any], part: str, where: str = "architecture") -> nn.Module:
    """The module that a configuration describes, on the current default device.

    Raises LiveryError when the class is not one of CLASSES or does not take the configuration.
    """
    kind = CLASSES.get(str(config.get("_class_name")))
    if kind is None:
        raise LiveryError(
            f"{where}: {part} is of the class {config.get('_class_name')}; not one livery reads"
        )
    settings = {key: value for key, value in config.items() if not key.startswith("_")}
    try:
        if issubclass(kind, transformers.PreTrainedModel):
            return kind(cast(Any, kind.config_class)(**settings))
        return kind.from_config(settings)
    except (TypeError, ValueError, KeyError, AssertionError, ZeroDivisionError, IndexError) as error:
        raise LiveryError(f"{where}: the configuration of {part} does not fit its class: {error}") from None


def build_other(config: Mapping[str, Any], part: str, where: str = "architecture") -> Any:
    """A scheduler, or a CLIP tokenizer of the vocabulary that ships. Raises LiveryError when neither."""
    name = str(config.get("_class_name"))
    if name == "CLIPTokenizer":
        return clip_tokenizer(config["pad_token"], config["model_max_length"])
    kind = getattr(diffusers, name, None) if name.endswith("Scheduler") else None
    if kind is None:
        raise LiveryError(f"{where}: {part} is of the class {name}; not one livery reads")
    return kind.from_config(dict(config))


def empty_weights() -> AbstractContextManager[None]:
    """Modules built inside have parameters without memory; buffers, which files do not hold, are real."""
    return init_empty_weights(include_buffers=False)


def tie(module: nn.Module) -> None:
    """Let T5's two embeddings be one again: building with empty weights takes them apart."""
    if isinstance(module, transformers.PreTrainedModel):
        module.tie_weights()


def assemble(family: str, parts: Mapping[str, Any], where: str) -> Backbone:
    """A backbone of loaded parts, named as diffusers names them. Raises LiveryError as its family does."""
    kind = plugins.families()[family]
    return kind(**parts, where=where)


def count(module: nn.Module) -> int:
    """Parameters of a module, on the meta device too."""
    return sum(parameter.numel() for parameter in module.parameters())


@cache
def _shipped(name: str) -> Architecture:
    file = importlib.resources.files("livery.models") / "configs" / f"{name}.json"
    return Architecture(**json.loads(file.read_text("utf-8")))


def _fill(
    module: nn.Module, device: torch.device, dtype: torch.dtype, generator: torch.Generator
) -> nn.Module:
    """Random weights in place of empty ones; variances as at a usual start, so that nothing overflows."""
    for owner in module.modules():
        for name, empty in list(owner.named_parameters(recurse=False)):
            weight = torch.empty(empty.shape, device=device, dtype=dtype)
            _draw(weight, name, generator)
            setattr(owner, name, nn.Parameter(weight, requires_grad=False))
        for name, buffer in list(owner.named_buffers(recurse=False)):
            setattr(owner, name, buffer.to(device, dtype if buffer.is_floating_point() else None))
    tie(module)
    return module


def _draw(weight: Tensor, name: str, generator: torch.Generator) -> None:
    if weight.ndim == 1:
        weight.fill_(0.0 if name == "bias" else 1.0)
    else:
        weight.normal_(0.0, weight[0].numel() ** -0.5, generator=generator)
