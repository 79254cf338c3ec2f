"""One training step without arithmetic: how much memory its tensors hold at once, and its multiplications.

A copy of the model on fake tensors (shapes and dtypes, no content) runs forward and backward, so what
autograd keeps, what checkpointing drops and what stored weights save is counted, not guessed. It takes
seconds, and next to no memory, whatever the size of the model.
"""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from livery.models.backbone import Backbone, Conditioning
from livery.models.device import Precision, autocast

T = TypeVar("T")


@dataclass(frozen=True)
class Size:
    """What a step works on: `rows` pictures of `height` x `width` pixels."""

    rows: int
    height: int
    width: int


@dataclass(frozen=True)
class Work:
    """Bytes held at once, above what was there before; floating point operations, 2 per product; calls."""

    peak_bytes: int
    flops: int
    operations: int


class Holdings(TorchDispatchMode):
    """Counts the storages that operations make, while they live."""

    def __init__(self) -> None:
        super().__init__()
        self.held = self.peak = self.operations = 0
        self._known: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.operations += 1
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
def shadow(backbone: Backbone) -> Generator[Backbone]:
    """A copy of the backbone, and of what is attached to it, without content: same devices, shapes and
    dtypes, no memory. Inside, every operation is on such tensors, and every change is the copy's own.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    memo: dict[int, Any] = {}
    for part in (backbone.vae, *backbone.modules().values()):
        for param in part.parameters():
            memo[id(param)] = nn.Parameter(mode.from_tensor(param.detach()), param.requires_grad)
        for buffer in part.buffers():
            memo[id(buffer)] = mode.from_tensor(buffer)
    for tokenizer in backbone.tokenizers.values():
        memo[id(tokenizer)] = tokenizer
    copied = copy.deepcopy(backbone, memo)
    with mode:
        yield copied


def step_work(copied: Backbone, size: Size, precision: Precision, *, towers_train: bool) -> Work:
    """Forward and backward of one batch in a shadow, gradients included, the optimiser left out."""

    def step() -> None:
        with torch.no_grad():
            latents = _latents(copied, size)
            prompts = None if towers_train else _prompts(copied, size.rows)
        with autocast(latents.device, precision, latents[0, 0].numel()):
            told = prompts or copied.encode_prompts(["x"] * size.rows)
            t = copied.noise.levels(size.rows).to(latents.device)
            guess = copied.predict(latents, t, told)
        (guess.float() - latents).square().mean().backward()

    return _measured(step)


@torch.no_grad()
def caching_work(copied: Backbone, size: Size) -> Work:
    """Encoding one picture and one caption in a shadow, as the cache is filled."""
    pixels = torch.zeros(1, 3, size.height, size.width, device=copied.device)
    picture = _measured(lambda: copied.encode_images(pixels))
    words = _measured(lambda: copied.encode_prompts(["x"]))
    return Work(
        max(picture.peak_bytes, words.peak_bytes),
        picture.flops + words.flops,
        picture.operations + words.operations,
    )


def held_after(work: Callable[[], T]) -> tuple[T, int]:
    """What the work returns, and the bytes of the tensors that it left behind."""
    holdings = Holdings()
    with holdings:
        result = work()
    return result, holdings.held


def part_bytes(part: nn.Module) -> int:
    """All its parameters and buffers; what several modules share counts once."""
    return sum(t.nbytes for t in {id(t): t for t in (*part.parameters(), *part.buffers())}.values())


def _measured(work: Callable[[], Any]) -> Work:
    """Garbage in cycles counts to the end: when it is collected is chance, and the count should not be."""
    holdings, flops, collects = Holdings(), FlopCounterMode(display=False), gc.isenabled()
    gc.disable()
    try:
        with flops, holdings:
            result = work()
    finally:
        gc.enable() if collects else None
    del result
    return Work(holdings.peak, flops.get_total_flops(), holdings.operations)


def _latents(copied: Backbone, size: Size) -> Tensor:
    factor = copied.latent.factor
    shape = (size.rows, copied.latent.channels, size.height // factor, size.width // factor)
    return torch.zeros(shape, device=copied.device)


def _prompts(copied: Backbone, rows: int) -> Conditioning:
    return Conditioning.stack([copied.encode_prompts(["x"])] * rows)
