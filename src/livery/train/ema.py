"""A running mean of what learns, which is often better than the last step: Polyak and Juditsky 1992."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import Parameter


class Ema:
    """mean <- mean + (1 - decay) (value - mean) after each step, in float32.

    Early steps use a smaller decay, so that the start is soon forgotten: as diffusers' EMAModel does.
    """

    def __init__(self, params: Mapping[str, Parameter], decay: float) -> None:
        self._params, self._decay = dict(params), decay
        self._means = {name: param.detach().float().clone() for name, param in params.items()}

    @torch.no_grad()
    def follow(self, step: int) -> None:
        """Take in the parameters after optimiser step 1, 2, ..."""
        decay = min(self._decay, step / (9 + step)) if step > 1 else 0.0
        values = [param.detach().float() for param in self._params.values()]
        for mean, value in zip(self._means.values(), values, strict=True):
            mean.lerp_(value, 1 - decay)

    @contextmanager
    def in_place(self) -> Generator[None]:
        """The parameters hold the mean for the length of a `with`."""
        kept = {name: param.detach().clone() for name, param in self._params.items()}
        self._put(self._means)
        try:
            yield
        finally:
            self._put(kept)

    def state(self) -> dict[str, Tensor]:
        return dict(self._means)

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        for name, mean in self._means.items():
            mean.copy_(state[name])

    @torch.no_grad()
    def _put(self, values: Mapping[str, Tensor]) -> None:
        for name, param in self._params.items():
            param.copy_(values[name])
