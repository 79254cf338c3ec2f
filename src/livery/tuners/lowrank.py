"""Low-rank updates of frozen layers, through peft: LoRA, DoRA, LoHa, LoKr and OFT.

Each targeted layer W (linear or convolution) acts as W', where at the start W' = W:

- lora: W + s B A, with A [rank, in] random, B [out, rank] zero and s = alpha / rank; Hu et al. 2021
  (arXiv:2106.09685). `rslora`: s = alpha / sqrt(rank); Kalajdzievski 2023 (arXiv:2312.03732).
- lora with `dora`: m (W + s B A) / |W + s B A|, a learnt length m for each output; Liu et al. 2024
  (arXiv:2402.09353).
- loha: W + s (A1 B1) * (A2 B2), element by element; Hyeon-Woo et al. 2021 (arXiv:2108.06098).
- lokr: W + s W1 (x) (A B), a Kronecker product; Yeh et al. 2023 (arXiv:2309.14859). The second factor is
  whole, not A B, where the rank is at least half its side. s = alpha / rank.
- oft: W R, with R a block-diagonal rotation, by Cayley's transform of a skew matrix; Qiu et al. 2023
  (arXiv:2306.07280). `rank` is the blocks' side, or the nearest that divides the layer's inputs.

Any family: it reads `backbone.lora_targets` and, for text encoders, `backbone.tower_targets`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Self

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn import Parameter

from livery.models.backbone import Backbone
from livery.nouns import LiveryError, LowRankSpec
from livery.tuners.peft_layers import NAME, between, gradient_flags_kept, own, take_out, wrap
from livery.tuners.targets import compiled, nothing_matches, tower
from livery.tuners.tuner import Part, check_state

DENOISER = "denoiser"
ADAPTABLE = (nn.Linear, nn.Conv2d)
LEAVES: Mapping[str, str] = {"lora": "lora_", "loha": "hada_", "lokr": "lokr_", "oft": "oft_"}
"""How the names of each kind's tensors begin, behind the layer's name."""


@dataclass(frozen=True)
class LowRank:
    """Low-rank updates of the layers that the spec names, or of exactly `layers`: part -> layer names."""

    spec: LowRankSpec = field(default_factory=LowRankSpec)
    layers: Mapping[str, tuple[str, ...]] | None = None

    @property
    def touches(self) -> frozenset[Part]:
        parts = [DENOISER, *self.spec.towers] if self.layers is None else list(self.layers)
        return frozenset("denoiser" if part == DENOISER else "towers" for part in parts)

    @classmethod
    def build(cls, spec: LowRankSpec) -> Self:
        return cls(spec)

    def aimed_at(self, state: Mapping[str, Tensor]) -> Self:
        """Where the spec names targets, only layers that they match: two LoRAs may share a state."""
        found: dict[str, dict[str, None]] = {}
        for key in state:
            name, leaf, _ = key.partition(f".{LEAVES[self.spec.kind]}")
            part, _, layer = name.partition(".")
            if leaf and layer and self._means(part, layer):
                found.setdefault(part, {})[layer] = None
        return replace(self, layers={part: tuple(names) for part, names in found.items()})

    def attach(self, backbone: Backbone, seed: int = 0) -> AttachedLowRank:
        """Raises LiveryError when targets match no layer, or one that this kind cannot adapt."""
        chosen = self._chosen(backbone)
        _check_patterns(self.spec, chosen)
        made: dict[str, Mapping[str, BaseTunerLayer]] = {}
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # not torch.manual_seed: that seeds GPUs too
            for part, names in chosen.items():
                ranks = {name: _rank_and_alpha(self.spec, part, name) for name in names}
                made[part] = wrap(self.spec, backbone.modules()[part], ranks)
        return AttachedLowRank(self.spec, backbone, made)

    def _chosen(self, backbone: Backbone) -> dict[str, list[str]]:
        """Names of the layers to adapt, by part."""
        if self.layers is not None:
            return self._listed(backbone)
        chosen = {DENOISER: _matching(backbone.denoiser, self.spec.targets or backbone.lora_targets)}
        for name in self.spec.towers:
            chosen[name] = _matching(tower(backbone, name), backbone.tower_targets)
        return chosen

    def _listed(self, backbone: Backbone) -> dict[str, list[str]]:
        """Those of `layers` that this base has; `load` reports the others."""
        chosen: dict[str, list[str]] = {}
        for part, names in (self.layers or {}).items():
            there = set(_adaptable(backbone.modules()[part])) if part in backbone.modules() else set()
            if here := [name for name in names if name in there]:
                chosen[part] = here
        if not chosen:
            raise LiveryError(
                f"the adapter has no tensors of kind '{self.spec.kind}' for a layer of this base: it is of "
                "another kind, or made for another base"
            )
        return chosen

    def _means(self, part: str, layer: str) -> bool:
        if self.spec.targets is None or part in self.spec.towers:
            return True
        return part == DENOISER and compiled(self.spec.targets).fullmatch(layer) is not None


class AttachedLowRank:
    """Low-rank updates at work. Several may be attached to one backbone, and undone in any order."""

    def __init__(
        self, spec: LowRankSpec, backbone: Backbone, made: Mapping[str, Mapping[str, BaseTunerLayer]]
    ) -> None:
        self._spec, self._backbone, self._made = spec, backbone, dict(made)
        self._hooks: list[Any] = []
        self.params: dict[str, Parameter] = {
            f"{part}.{layer}.{leaf}": param
            for part, layers in self._made.items()
            for layer, module in layers.items()
            for leaf, param in own(module)
        }
        self.train(False)

    def state(self) -> dict[str, Tensor]:
        return {name: p.detach().to("cpu", torch.float32, copy=True) for name, p in self.params.items()}

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        check_state(self.params, state)
        for name, param in self.params.items():
            param.copy_(state[name])

    def train(self, mode: bool = True) -> None:
        for layer in self._layers():
            layer.training = mode
            for name, child in layer.named_children():
                if name != "base_layer":  # that may hold another tuner's layer
                    child.train(mode)

    def scale(self, strength: float) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        linear = self._spec.kind != "oft" and not self._spec.dora
        for layer in self._layers():
            with gradient_flags_kept(layer):  # peft freezes what it switches off
                layer.enable_adapters(strength != 0)
            if linear:
                layer.set_scale(NAME, strength)
            elif strength not in (0, 1):
                hook = partial(between, strength)
                self._hooks.append(layer.register_forward_hook(hook, with_kwargs=True))

    def rate(self, name: str) -> float | None:
        return self._spec.towers.get(name.partition(".")[0], self._spec.learning_rate)

    def after_step(self) -> None:
        pass

    def undo(self) -> None:
        for part, layers in self._made.items():
            for name, layer in layers.items():
                take_out(self._backbone.modules()[part], name, layer)
        self._made, self.params, self._hooks = {}, {}, []

    def _layers(self) -> Iterator[Any]:
        for layers in self._made.values():
            yield from layers.values()


# ------------------------------------------------------------------ which layers, which rank


def _matching(model: nn.Module, regex: str) -> list[str]:
    """Names of the adaptable layers that the expression matches as a whole. Raises LiveryError for none."""
    pattern, layers = compiled(regex), list(_adaptable(model))
    names = [name for name in layers if pattern.fullmatch(name)]
    if not names:
        raise nothing_matches("targets", regex, "layer", layers)
    return names


def _adaptable(model: nn.Module) -> Iterator[str]:
    """Names of linear and convolution layers; one that has an adapter counts, its insides do not."""
    inside = ""
    for name, module in model.named_modules():
        if inside and name.startswith(inside):
            continue
        if isinstance(module, BaseTunerLayer):
            inside = f"{name}."
            yield name
        elif isinstance(module, ADAPTABLE):
            yield name


def _rank_and_alpha(spec: LowRankSpec, part: str, layer: str) -> tuple[int, float]:
    """Of one layer: the first pattern that matches it, else the spec's; alpha is the rank unless given."""
    rank = _first(spec.ranks, part, layer, "ranks") or spec.rank
    alpha = _first(spec.alphas, part, layer, "alphas") or spec.alpha
    return int(rank), float(rank if alpha is None else alpha)


def _first(patterns: Mapping[str, float], part: str, layer: str, key: str) -> float | None:
    return next((value for regex, value in patterns.items() if _hits(regex, part, layer, key)), None)


def _hits(regex: str, part: str, layer: str, key: str) -> bool:
    """Patterns match a layer's name within its part, or with the part before it."""
    pattern = compiled(regex, key)
    return any(pattern.fullmatch(name) for name in (layer, f"{part}.{layer}"))


def _check_patterns(spec: LowRankSpec, chosen: Mapping[str, Sequence[str]]) -> None:
    """Raises LiveryError for a pattern in `ranks` or `alphas` that matches none of the adapted layers."""
    layers = [(part, name) for part, names in chosen.items() for name in names]
    for key, patterns in {"ranks": spec.ranks, "alphas": spec.alphas}.items():
        for regex in patterns:
            if not any(_hits(regex, part, layer, key) for part, layer in layers):
                raise nothing_matches(key, regex, "adapted layer", [layer for _, layer in layers])
