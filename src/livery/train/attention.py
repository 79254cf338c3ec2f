"""Which kind of attention is faster on this machine, for this model at this size: measured once, remembered.

On a CPU in half precision, attention written out as matrix products beats the fused kernel for some shapes
and loses for others, by 10 to 20% of a step; no rule of thumb holds on every processor.
"""

from __future__ import annotations

import json
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from livery.files import write_bytes
from livery.models.backbone import Backbone
from livery.models.device import Precision, autocast, device_name, resolve
from livery.nouns import sha256_of
from livery.train.batches import Plan, batches_of_step
from livery.train.cache import Encodings

Kind = Literal["as usual", "fused", "written-out"]
BACKENDS = {
    "fused": [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH],
    "written-out": [SDPBackend.MATH],
}
MOST_CELLS = 1024
"""Of a picture's latents: above it, written-out scores take too much memory."""
TURNS = 4


def fastest(backbone: Backbone, plan: Plan, encodings: Encodings, file: Path) -> Kind:
    """The kind for a run with something attached; `file` remembers what was measured on this machine."""
    precision = plan.recipe.precision
    if backbone.device.type != "cpu" or resolve(precision, backbone.device) == "fp32":
        return "as usual"
    rows = next(batches_of_step(plan, 0))
    with torch.no_grad():
        clean, prompts = encodings.latents(rows), encodings.prompts(rows)
    if clean[0, 0].numel() > MOST_CELLS:
        return "fused"
    known: dict[str, Kind] = _read(file)
    key = sha256_of(
        [
            device_name(backbone.device),
            torch.__version__,
            torch.get_num_threads(),
            backbone.sha256,
            list(clean.shape),
            sorted(spec.kind for spec in plan.recipe.tuners),
        ]
    )[:16]
    if key not in known:
        taken: dict[Kind, list[float]] = {"fused": [], "written-out": []}
        t = backbone.noise.levels(len(clean))
        for _ in range(TURNS):
            for kind, times in taken.items():
                began = time.process_time()
                _pass(backbone, precision, kind, clean, t, prompts)
                times.append(time.process_time() - began)
        known[key] = min(taken, key=lambda kind: median(taken[kind][1:]))
        write_bytes(file, json.dumps(_read(file) | known).encode())
    return known[key]


@contextmanager
def attending(denoiser: nn.Module, kind: Kind) -> Generator[None]:
    """The denoiser attends in this way, whatever is chosen around it."""
    if kind == "as usual":
        yield
        return
    forward, own = denoiser.forward, "forward" in vars(denoiser)

    def with_kind(*args: Any, **kwargs: Any) -> Any:
        with sdpa_kernel(BACKENDS[kind]):
            return forward(*args, **kwargs)

    denoiser.forward = with_kind
    try:
        yield
    finally:
        if own:
            denoiser.forward = forward
        else:
            del denoiser.forward


def _pass(backbone: Backbone, precision: Precision, kind: Kind, clean: Any, t: Any, prompts: Any) -> None:
    """Forward and backward; no gradient is left behind."""
    learning = [p for part in backbone.modules().values() for p in part.parameters() if p.requires_grad]
    with attending(backbone.denoiser, kind), autocast(backbone.device, precision, clean[0, 0].numel()):
        guess = backbone.predict(clean, t, prompts)
    if guess.requires_grad:
        torch.autograd.grad(guess.float().square().mean(), learning, allow_unused=True)


def _read(file: Path) -> dict[str, Kind]:
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
