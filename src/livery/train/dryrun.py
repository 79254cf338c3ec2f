"""One training step without arithmetic: how much memory its tensors hold at once, and its multiplications.

The real modules run forward and backward on fake tensors (shapes and dtypes, no content), so what
autograd keeps, what checkpointing drops and what stored weights save is counted, not guessed. Seconds,
and next to no memory, whatever the size of the model.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from livery.models.backbone import Backbone, Conditioning
from livery.models.device import Precision, autocast
from livery.tuners.tuner import Attached


@dataclass(frozen=True)
class Size:
    """What a step works on: `rows` pictures of `height` x `width` pixels."""

    rows: int
    height: int
    width: int


@dataclass(frozen=True)
class Work:
    """Bytes held at once, above what was there before, and floating point operations (2 per product)."""

    peak_bytes: int
    flops: int


class Holdings(TorchDispatchMode):
    """Counts the storages that operations make, while they live."""

    def __init__(self) -> None:
        super().__init__()
        self.held = self.peak = 0
        self._known: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        inputs = {id(t.untyped_storage()) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and id(leaf.untyped_storage()) not in inputs:
                self._note(leaf.untyped_storage())
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        key = id(storage)
        if key in self._known:
            return
        size = storage.nbytes()

        def freed(_: Any) -> None:
            self.held -= size
            self._known.pop(key, None)

        self._known[key] = weakref.ref(storage, freed)
        self.held += size
        self.peak = max(self.peak, self.held)


@contextmanager
def pretending() -> Generator[tuple[Holdings, FlopCounterMode]]:
    """Operations inside compute nothing; real tensors may take part and do not change."""
    holdings, flops = Holdings(), FlopCounterMode(display=False)
    with FakeTensorMode(allow_non_fake_inputs=True), flops, holdings:
        yield holdings, flops


def step_work(
    backbone: Backbone, attached: Attached, size: Size, precision: Precision, *, towers_train: bool
) -> Work:
    """Forward and backward of one batch, gradients included, the optimiser left out."""
    before = {name: param.grad for name, param in attached.params.items()}

    def step() -> None:
        with torch.no_grad():
            latents = _latents(backbone, size)
            prompts = None if towers_train else _prompts(backbone, size.rows)
        cells = latents[0, 0].numel()
        with autocast(latents.device, precision, cells):
            told = prompts or backbone.encode_prompts(["x"] * size.rows)
            t = backbone.noise.sample_timesteps(size.rows).to(latents.device)
            guess = backbone.predict(latents, t, told)
        (guess.float() - latents).square().mean().backward()

    try:
        return _measured(step)
    finally:
        for name, param in attached.params.items():
            param.grad = before[name]


@torch.no_grad()
def caching_work(backbone: Backbone, size: Size) -> Work:
    """Encoding one picture and one caption, as the cache is filled."""
    pixels = _measured(lambda: backbone.encode_images(_zeros(backbone, (1, 3, size.height, size.width))))
    words = _measured(lambda: backbone.encode_prompts(["x"]))
    return Work(max(pixels.peak_bytes, words.peak_bytes), pixels.flops + words.flops)


def part_bytes(part: nn.Module) -> int:
    """All its parameters and buffers; what several modules share counts once."""
    return sum(t.nbytes for t in {id(t): t for t in (*part.parameters(), *part.buffers())}.values())


def _measured(work: Callable[[], Any]) -> Work:
    with pretending() as (holdings, flops):
        result = work()
    del result
    return Work(holdings.peak, flops.get_total_flops())


def _zeros(backbone: Backbone, shape: tuple[int, ...]) -> Tensor:
    return torch.zeros(shape, device=backbone.device)


def _latents(backbone: Backbone, size: Size) -> Tensor:
    factor = backbone.latent.factor
    shape = (size.rows, backbone.latent.channels, size.height // factor, size.width // factor)
    return _zeros(backbone, shape)


def _prompts(backbone: Backbone, rows: int) -> Conditioning:
    return Conditioning.stack([backbone.encode_prompts(["x"])] * rows)
