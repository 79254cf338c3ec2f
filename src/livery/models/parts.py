"""What families share: a base model made of diffusers' and transformers' parts, by their folder's names."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self, cast

import diffusers
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import Tensor, nn

from livery.models import checkpoint, text
from livery.models import noise as noise_laws
from livery.models.backbone import Backbone, LatentSpec, PipelineKind
from livery.nouns import LiveryError

if TYPE_CHECKING:
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

UNET_TARGETS = r".*\.transformer_blocks\.\d+\.(attn[12]\.to_([qkv]|out\.0)|ff\.net\.(0\.proj|2))"
"""Attention and feed-forward projections of every transformer block of a U-Net.

Attention alone is what diffusers' trainer adapts; the feed-forward layers add capacity for texture and line,
which a style is made of. Convolutions of the resnets are left out: many more weights, and A1111 and diffusers
differ on them.
"""
UNET_SHAPE = ("attention_head_dim", "norm_num_groups", "act_fn", "use_linear_projection")
"""What shapes a U-Net's output beside its weights."""
SCHEDULER_FILES = {"scheduler": "scheduler_config.json"}


class DiffusersBackbone(Backbone):
    """A base of one denoiser, one KL autoencoder, towers, their tokenizers and a scheduler.

    A family's `__init__` takes its parts as keywords, by their names in a diffusers folder ("unet",
    "tokenizer_2"), so that `cls(**parts)` builds it from any source. All float32, frozen; bf16 is the
    caller's choice, through torch.autocast.
    """

    people: ClassVar[str]
    """What people call such a model, for errors: "an SD 1.x or 2.x"."""
    denoiser_part: ClassVar[str]
    """The denoiser's name in the folder: "unet" or "transformer"."""
    part_kinds: ClassVar[Mapping[str, Any]]
    """Parts with weights -> their class, in the order in which they are read."""
    tokenizer_kinds: ClassVar[Mapping[str, Any]]
    """Tokenizers by their names in the folder ("tokenizer_2", of "text_encoder_2") -> their class."""
    optional: ClassVar[frozenset[str]] = frozenset()
    """Parts that a folder's index may leave out or set to [null, null]."""
    pipeline_kinds: ClassVar[Mapping[PipelineKind, str]]
    settings: ClassVar[Mapping[str, Any]] = {}
    """What a folder's index may set beside the parts -> what diffusers takes otherwise."""
    scheduler: Any
    lengths: Mapping[str, int]
    """Ids per prompt, by tower."""

    def _assemble(
        self,
        denoiser: nn.Module,
        vae: AutoencoderKL,
        towers: Mapping[str, nn.Module],
        tokenizers: Mapping[str, Any],
        scheduler: Any,
        where: str,
    ) -> None:
        """Keep and freeze the parts, and read the facts that every family has from them."""
        for name, tower in towers.items():
            text.check_words(tokenizers[name], tower, name, where)
        self.denoiser, self.vae, self.scheduler = denoiser, vae, scheduler
        self.towers, self.tokenizers, self.placeholders = dict(towers), dict(tokenizers), {}
        self.lengths = {name: text.length(tokenizers[name], tower) for name, tower in towers.items()}
        for part in (vae, *self.modules().values()):
            cast(nn.Module, part).eval().requires_grad_(False)
        self.latent = _latent(vae, where)
        self.noise = noise_laws.from_config(scheduler.config, where=f"{where}/scheduler")
        self.resolution = int(cast(Any, denoiser).config["sample_size"]) * self.latent.factor

    @classmethod
    def load(cls, source: str | Path, *, device: str = "cpu", allow_network: bool = False) -> Self:
        folder = checkpoint.find_folder(source, allow_network=allow_network)
        family: Any = cls
        return family(**cls.read(folder), where=str(folder)).to(device)

    @classmethod
    def read(cls, folder: Path) -> dict[str, Any]:
        """The parts of a diffusers folder, as the family's `__init__` takes them."""
        name = checkpoint.pipeline_name(folder)
        if name not in cls.pipelines:
            raise LiveryError(f"{folder}: a {name} folder, not {cls.people} one ({cls.pipelines[0]})")
        index = checkpoint.read_json(folder, checkpoint.INDEX)
        absent = {part for part in cls.optional if not any(index.get(part) or ())}
        kinds = {part: kind for part, kind in cls.part_kinds.items() if part not in absent}
        words = {part: kind for part, kind in cls.tokenizer_kinds.items() if part not in absent}
        files = {**dict.fromkeys(words, "tokenizer_config.json"), **SCHEDULER_FILES}
        checkpoint.require_parts(folder, {part: _stem(part) for part in kinds}, files)
        return {
            **{part: checkpoint.read_part(kind, folder, part, _stem(part)) for part, kind in kinds.items()},
            **{part: text.read_tokenizer(kind, folder / part) for part, kind in words.items()},
            **dict.fromkeys(absent),
            **{key: index.get(key, default) for key, default in cls.settings.items()},
            "scheduler": _read_scheduler(folder),
        }

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
        with self._safe_vae() as vae:
            mean = vae.encode(pixels.to(self.device, vae.dtype)).latent_dist.mean.float()
        return (mean - self.latent.shift) * self.latent.scale

    @torch.no_grad()
    def decode_latents(self, latents: Tensor) -> Tensor:
        with self._safe_vae() as vae:
            inner = latents.to(self.device).float() / self.latent.scale + self.latent.shift
            return vae.decode(inner.to(vae.dtype)).sample.float()

    @contextmanager
    def _safe_vae(self) -> Iterator[Any]:
        """The autoencoder, in float32 where float16 overflows in it, as its configuration tells.

        A black picture or a NaN latent is what comes otherwise, in SDXL above all. bf16 has the range.
        """
        vae: Any = self.vae
        if not vae.config.get("force_upcast", True):
            yield vae
            return
        if vae.dtype == torch.float16:
            vae.float()
        kind = self.device.type
        halves = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.float16
        with torch.autocast(kind, enabled=False) if halves else nullcontext():
            yield vae

    def tokenize(self, tower: str, prompts: Sequence[str]) -> Any:
        """Ids and mask [B, T], by the tokenizer and placeholders of this moment."""
        texts = text.replaced(prompts, self.placeholders)
        return text.tokenize(self.tokenizers[tower], texts, self.lengths[tower]).to(self.device)

    def _clip(self, tower: str, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """A CLIP tower's last but one hidden state [B, T, D], and pooled [B, P] where it has a projection.

        The hidden state has not been through the final norm: so SDXL and SD3 read it.
        """
        ids = self.tokenize(tower, prompts)["input_ids"]
        answer = self.towers[tower](ids, output_hidden_states=True)
        return answer.hidden_states[-2], answer[0]

    def components(self) -> dict[str, Any]:
        """The parts by their names in a diffusers folder, as `__init__` takes them."""
        return {
            self.denoiser_part: self.denoiser,
            "vae": self.vae,
            **self.towers,
            **{tower.replace("text_encoder", "tokenizer"): words for tower, words in self.tokenizers.items()},
            "scheduler": self.scheduler,
        }

    def pipeline(self, kind: PipelineKind = "text-to-image") -> DiffusionPipeline:
        with checkpoint.quiet():
            pipeline_kind: Any = getattr(diffusers, self.pipeline_kinds[kind])
        pipe = pipeline_kind(
            **{**self.components(), "scheduler": self._own_scheduler()}, **self._pipeline_options(kind)
        )
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def _own_scheduler(self) -> Any:
        """A fresh one for each pipeline: schedulers hold the state of a drawing."""
        return type(self.scheduler).from_config(self.scheduler.config)

    def _pipeline_options(self, kind: PipelineKind) -> dict[str, Any]:
        """What the family's pipelines take beside the parts."""
        return {}

    def _word_facts(self) -> dict[str, Any]:
        """What the tokenizers add to the identity of the base; plain values where there is one."""
        vocabularies = {name: text.vocabulary_hash(words) for name, words in self.tokenizers.items()}
        facts = {"max_length": dict(self.lengths), "vocabulary": vocabularies}
        if len(vocabularies) > 1:
            return {**facts, "padding": {name: words.pad_token_id for name, words in self.tokenizers.items()}}
        return {key: next(iter(values.values())) for key, values in facts.items()}

    def _hashed(self, facts: Mapping[str, Any]) -> str:
        """The identity of the base: its weights, its latent space and the family's own facts."""
        spec = self.latent
        known = {
            "family": self.family,
            "latent": [spec.channels, spec.factor, spec.scale, spec.shift],
        }
        return checkpoint.fingerprint({"vae": self.vae, **self.modules()}, {**known, **facts})


def check_channels(denoiser: Any, vae: Any, what: str, where: str) -> None:
    """Raises LiveryError for a denoiser that takes more than latents. `what` is people's word for it."""
    channels, latent = denoiser.config["in_channels"], vae.config["latent_channels"]
    if channels != latent:
        raise LiveryError(
            f"{where}: the {what} takes {channels} channels but the latents have {latent}: an inpainting, "
            "depth or editing model; give a plain text-to-image model"
        )


def check_width(reads: int, writes: int, what: str, where: str, by: str = "text_encoder") -> None:
    """Raises LiveryError when the denoiser reads text of another width than the towers write."""
    if reads != writes:
        raise LiveryError(f"{where}: the {what} reads text {reads} wide but {by} gives {writes}")


def unet_step(unet: Any, factor: int) -> int:
    """Pixels that a side must be a multiple of for the U-Net to halve it without a rest at every level."""
    return factor * 2 ** (len(unet.config["down_block_types"]) - 1)


def diffusion_facts(law: Any) -> dict[str, Any]:
    """What a noise schedule adds to the identity of a diffusion model."""
    return {
        "prediction": law.prediction,
        "alpha_bar": [round(float(level), 6) for level in law.alpha_bar],
    }


def _latent(vae: AutoencoderKL, where: str) -> LatentSpec:
    config = vae.config
    if config.get("latents_mean") is not None or config.get("latents_std") is not None:
        raise LiveryError(
            f"{where}: vae/config.json scales each channel by itself (latents_mean, latents_std), which "
            "livery does not read; give a base with one scaling_factor"
        )
    return LatentSpec(
        channels=config["latent_channels"],
        factor=2 ** (len(config["block_out_channels"]) - 1),
        scale=config["scaling_factor"],
        shift=config.get("shift_factor") or 0.0,
    )


def _stem(part: str) -> str:
    """How the weight file of a part is called by the library that writes it."""
    return "model" if part.startswith("text_encoder") else "diffusion_pytorch_model"


def _read_scheduler(folder: Path) -> Any:
    """The scheduler of the class that the folder names, made from its configuration."""
    config = checkpoint.read_json(folder / "scheduler", SCHEDULER_FILES["scheduler"])
    name = str(config.get("_class_name", "DDPMScheduler"))
    kind = getattr(diffusers, name, None) if name.endswith("Scheduler") else None
    if kind is None:
        raise LiveryError(f"{folder / 'scheduler'}: scheduler '{name}' is not one of diffusers'")
    return kind.from_config(config)
