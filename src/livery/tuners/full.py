"""Full fine-tuning: the weights themselves learn, of the denoiser and, when asked, of text encoders.

Nothing is added to the model, so the output does not change when it starts. A copy of the weights waits in
the host's memory, to undo it bit for bit. What was learnt is as large as the model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Self

from torch import Tensor, nn
from torch.nn import Parameter

from livery.models.backbone import Backbone
from livery.nouns import FullSpec, LiveryError
from livery.tuners.blend import Blend, Blended
from livery.tuners.targets import compiled, nothing_matches, tower
from livery.tuners.tuner import Part

DENOISER = "denoiser"


@dataclass(frozen=True)
class Full:
    """The weights whose names `targets` matches as a whole, or those that `names` lists."""

    spec: FullSpec = field(default_factory=FullSpec)
    names: frozenset[str] | None = None

    @property
    def touches(self) -> frozenset[Part]:
        if self.names is None:
            return frozenset({"denoiser", "towers"}) if self.spec.towers else frozenset({"denoiser"})
        parts = {name.partition(".")[0] for name in self.names}
        return frozenset("denoiser" if part == DENOISER else "towers" for part in parts)

    @classmethod
    def build(cls, spec: FullSpec) -> Self:
        return cls(spec)

    def aimed_at(self, state: Mapping[str, Tensor]) -> Self:
        """Names that are no weights of the base are other tuners' and are passed over when attaching."""
        return replace(self, names=frozenset(state))

    def attach(self, backbone: Backbone, seed: int = 0) -> AttachedFull:
        """Nothing is drawn at random. Raises LiveryError for targets or towers that are not there."""
        if self.names is None:
            params = dict(self._chosen(backbone))
        else:
            every = {n: p for part, model in backbone.modules().items() for n, p in _weights(part, model)}
            params = {name: param for name, param in every.items() if name in self.names}
            if not params:
                raise LiveryError("the adapter has no weight of this base: it is of another kind or base")
        return AttachedFull(params, self.spec)

    def _chosen(self, backbone: Backbone) -> Iterator[tuple[str, Parameter]]:
        weights = list(_weights(DENOISER, backbone.denoiser))
        if self.spec.targets is not None:
            pattern, names = compiled(self.spec.targets), [name.partition(".")[2] for name, _ in weights]
            weights = [each for each, name in zip(weights, names, strict=True) if pattern.fullmatch(name)]
            if not weights:
                raise nothing_matches("targets", self.spec.targets, "parameter", names)
        yield from weights
        for name in self.spec.towers:
            yield from _weights(name, tower(backbone, name))


class AttachedFull(Blended):
    """Weights of the base that learn."""

    def __init__(self, params: Mapping[str, Parameter], spec: FullSpec) -> None:
        super().__init__(params)
        self._spec = spec
        self._flags = {name: param.requires_grad for name, param in params.items()}
        for param in params.values():
            param.requires_grad_(True)

    def train(self, mode: bool = True) -> None:
        """The base's own dropout, which only T5 has, stays off: there is none to switch."""

    def rate(self, name: str) -> float | None:
        return self._spec.towers.get(name.partition(".")[0], self._spec.learning_rate)

    def after_step(self) -> None:
        pass

    def undo(self) -> None:
        self._blend.reset()
        for name, param in self._blend.params.items():
            param.requires_grad_(self._flags[name])
            param.grad = None
        self._blend = Blend({})


def _weights(part: str, model: nn.Module) -> Iterator[tuple[str, Parameter]]:
    """A part's parameters by full name. Raises LiveryError when another tuner has put layers into it."""
    for name, param in model.named_parameters():
        if "base_layer" in name.split("."):
            raise LiveryError(
                f"recipe: tuners: another tuner already works in the {part}: name kind 'full' before it"
            )
        yield f"{part}.{name}", param
