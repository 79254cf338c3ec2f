"""Draw pictures: a resident base, adapters attached for a while, prompts in batches."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import diffusers
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from livery.models.backbone import Backbone, Conditioning
from livery.models.checkpoint import quiet
from livery.models.device import Precision, autocast
from livery.models.noise import Flow
from livery.nouns import LiveryError
from livery.tuners.adapter_file import attach_adapter

Sampler = Literal["dpm++", "ddim", "euler", "euler-a"]

STEPS = 20
GUIDANCE = 4.0
BATCH_SIZE = 16
SAMPLERS: Mapping[Sampler, str] = {
    "dpm++": "DPMSolverMultistepScheduler",  # Lu et al. 2022, arXiv:2211.01095: second order, good in 20
    "ddim": "DDIMScheduler",  # Song et al. 2020, arXiv:2010.02502
    "euler": "EulerDiscreteScheduler",  # Karras et al. 2022, arXiv:2206.00364, algorithm 2 without churn
    "euler-a": "EulerAncestralDiscreteScheduler",  # fresh noise in each step
}
FLOW_SAMPLERS: Mapping[Sampler, str] = {
    "dpm++": "DPMSolverMultistepScheduler",
    "euler": "FlowMatchEulerDiscreteScheduler",  # Esser et al. 2024, arXiv:2403.03206: SD3's own
}
"""Those that suit rectified flow. DDIM is Euler there; fresh noise in each step would ignore the seeds."""


class Engine:
    """Draws with one backbone; what is attached to the backbone acts in the pictures."""

    def __init__(self, backbone: Backbone, precision: Precision = "auto") -> None:
        self.backbone = backbone
        self.precision: Precision = precision

    def generate(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        *,
        negative: str = "",
        steps: int = STEPS,
        guidance: float = GUIDANCE,
        batch_size: int = BATCH_SIZE,
        sampler: Sampler = "dpm++",
    ) -> Iterator[Image.Image]:
        """One picture per prompt, with the seed at its place; lazily, a batch at a time.

        Each picture's noise comes from its own seed, drawn on the CPU: a picture does not hang on the
        batch it is in, save for rounding in the last bits. `guidance` is the scale w of Ho and Salimans
        2022 (arXiv:2207.12598) as diffusers counts it: 1 = no guidance and half the work.
        """
        if len(prompts) != len(seeds):
            raise LiveryError(
                f"{len(prompts)} prompts but {len(seeds)} seeds: give one seed for each prompt."
            )
        rows = [*zip(prompts, seeds, strict=True)]
        pipeline = self._pipeline(sampler)
        encoded = self._encode({negative, *prompts})
        for first in range(0, len(rows), batch_size):
            batch = rows[first : first + batch_size]
            arguments = _prompt_arguments([encoded[prompt] for prompt, _ in batch])
            arguments |= _prompt_arguments([encoded[negative]] * len(batch), "negative_")
            arguments["generator"] = [torch.Generator().manual_seed(seed) for _, seed in batch]
            latents = self._latents(pipeline, arguments, steps, guidance)
            yield from self._images(latents)

    @contextmanager
    def adapter(self, path: Path, strength: float = 1.0) -> Iterator[None]:
        """Attach an adapter file for the length of a `with`; the base is bit-equal before and after.

        `strength` 0 draws as the base, 1 as trained. Raises LiveryError for an adapter of another base.
        """
        attached = attach_adapter(self.backbone, path)
        try:
            attached.scale(strength)
            yield
        finally:
            attached.undo()

    def _pipeline(self, sampler: Sampler) -> Any:
        """Diffusers' pipeline over the resident parts, with a scheduler of its own."""
        flow = isinstance(self.backbone.noise, Flow)
        known = FLOW_SAMPLERS if flow else SAMPLERS
        if sampler not in known:
            what = "not one for rectified flow" if flow and sampler in SAMPLERS else "not known"
            raise LiveryError(f"sampler '{sampler}' is {what}: choose one of {', '.join(known)}.")
        pipeline: Any = self.backbone.pipeline("text-to-image")
        scheduler: Any = getattr(diffusers, known[sampler])
        config = pipeline.scheduler.config
        with quiet():  # each scheduler warns of settings that only others have
            pipeline.scheduler = scheduler.from_config(config, **(_flow_settings(config) if flow else {}))
        return pipeline

    @torch.no_grad()
    def _encode(self, prompts: set[str]) -> dict[str, Conditioning]:
        """Each distinct prompt once, and alone: its bits do not hang on its neighbours."""
        return {prompt: self.backbone.encode_prompts([prompt]) for prompt in sorted(prompts)}

    @torch.no_grad()
    def _latents(self, pipeline: Any, arguments: dict[str, Any], steps: int, guidance: float) -> Tensor:
        """Run the sampler -> [B, C, h, w]. bf16 stays inside the denoiser: guidance and steps are fp32."""
        side = self.backbone.resolution
        cells = (side // self.backbone.latent.factor) ** 2
        hook = self.backbone.denoiser.register_forward_hook(_answer_in_fp32)
        try:
            with autocast(self.backbone.device, self.precision, cells):
                result = pipeline(
                    **arguments,
                    num_inference_steps=steps,
                    guidance_scale=guidance,
                    height=side,
                    width=side,
                    output_type="latent",
                )
        finally:
            hook.remove()
        return result.images

    @torch.no_grad()
    def _images(self, latents: Tensor) -> Iterator[Image.Image]:
        pixels = self.backbone.decode_latents(latents)
        levels = ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
        for picture in levels.permute(0, 2, 3, 1).cpu().numpy():
            yield Image.fromarray(picture)


def _prompt_arguments(rows: Sequence[Conditioning], prefix: str = "") -> dict[str, Any]:
    """Conditioning under the names that every diffusers pipeline gives it."""
    names = {"tokens": "prompt_embeds", "pooled": "pooled_prompt_embeds"}
    parts = Conditioning.stack(rows).tensors()
    return {f"{prefix}{names[name]}": part for name, part in parts.items() if name in names}


def _flow_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """How diffusers' solvers are told of rectified flow; flow schedulers of their own do not read these."""
    return {
        "prediction_type": "flow_prediction",
        "use_flow_sigmas": True,
        "flow_shift": config["shift"],
    }


def _answer_in_fp32(module: torch.nn.Module, inputs: Any, answer: Any) -> Any:
    """A forward hook; without it diffusers would keep the latents in bf16 between the steps."""
    if isinstance(answer, tuple):
        return tuple(part.float() if isinstance(part, Tensor) else part for part in answer)
    return answer


def png_bytes(image: Image.Image, metadata: Mapping[str, str]) -> bytes:
    """PNG with what made it (prompt, seed, adapter id, ...) as text chunks; equal input, equal bytes."""
    chunks = PngInfo()
    for key in sorted(metadata):
        chunks.add_itxt(key, metadata[key])
    buffer = io.BytesIO()
    image.save(buffer, "PNG", pnginfo=chunks, compress_level=6)
    return buffer.getvalue()
