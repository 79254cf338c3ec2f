"""Parameters of the model's own that learn, and can stand between what they were and what was learnt."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import Parameter

from livery.tuners.tuner import check_state


class Blend:
    """Parameters, and a copy of their start on the CPU; at strength 1, where they are trained, no more."""

    def __init__(self, params: Mapping[str, Parameter]) -> None:
        self.params = dict(params)
        self._start = {name: _copy(param) for name, param in self.params.items()}
        self._learnt: dict[str, Tensor] = {}  # only while the strength is not 1
        self._strength = 1.0

    def state(self) -> dict[str, Tensor]:
        """What was learnt, whatever the strength: float32 copies on the CPU."""
        learnt = self._learnt or self.params
        return {name: tensor.detach().to("cpu", torch.float32, copy=True) for name, tensor in learnt.items()}

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Raises LiveryError, with nothing changed, for other names or shapes."""
        check_state(self.params, state)
        for name, tensor in (self._learnt or self.params).items():
            tensor.copy_(state[name])
        if self._learnt:
            self._show()

    def scale(self, strength: float) -> None:
        if not self._learnt and strength != 1:
            self._learnt = {name: _copy(param) for name, param in self.params.items()}
        self._strength = strength
        if self._learnt:
            self._show()
        if strength == 1:
            self._learnt = {}

    @torch.no_grad()
    def reset(self) -> None:
        """Back to the start, bit for bit."""
        for name, param in self.params.items():
            param.copy_(self._start[name])

    @torch.no_grad()
    def _show(self) -> None:
        """Put start + strength (learnt - start) into the parameters; exact at 0 and at 1."""
        for name, param in self.params.items():
            start, learnt = self._start[name], self._learnt[name]
            if self._strength in (0, 1):
                param.copy_(learnt if self._strength else start)
            else:
                param.copy_(torch.lerp(start.float(), learnt.float(), self._strength))


class Blended:
    """What is the same of all attached tuners whose parameters are a Blend."""

    def __init__(self, params: Mapping[str, Parameter]) -> None:
        self._blend = Blend(params)

    @property
    def params(self) -> Mapping[str, Parameter]:
        return self._blend.params

    def state(self) -> dict[str, Tensor]:
        return self._blend.state()

    def load(self, state: Mapping[str, Tensor]) -> None:
        self._blend.load(state)

    def scale(self, strength: float) -> None:
        self._blend.scale(strength)


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)
