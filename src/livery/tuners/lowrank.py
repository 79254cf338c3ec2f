"""LoRA: frozen weights plus a product of two small matrices, Hu et al. 2021 (arXiv:2106.09685), through peft.

Each targeted layer W x becomes W x + (alpha / rank) B (A x), with A [rank, in] drawn at random and B
[out, rank] zero, so that attaching changes nothing. Any family: it only reads `backbone.lora_targets`.
"""

from __future__ import annotations

import itertools
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn import Parameter

from livery.models.backbone import Backbone
from livery.nouns import LiveryError, LowRankSpec
from livery.tuners.tuner import Part, check_state

PART = "denoiser"
ADAPTABLE = (nn.Linear, nn.Conv2d)


@dataclass(frozen=True)
class LowRank:
    """Low-rank updates of the denoiser's layers; `targets` is matched against whole module names."""

    rank: int = 16
    alpha: float | None = None
    targets: str | None = None
    touches: ClassVar[frozenset[Part]] = frozenset({PART})

    @classmethod
    def build(cls, spec: LowRankSpec) -> Self:
        return cls(spec.rank, spec.alpha, spec.targets)

    def aimed_at(self, state: Mapping[str, Tensor]) -> Self:
        names = sorted(
            {
                key.removeprefix(f"{PART}.").rsplit(".lora_", 1)[0]
                for key in state
                if key.startswith(f"{PART}.")
            }
        )
        return replace(self, targets=_exactly(names))

    def attach(self, backbone: Backbone, seed: int = 0) -> AttachedLowRank:
        """Raises LiveryError when the targets match no layer that can be adapted."""
        model = backbone.denoiser
        names = _matching(model, self.targets or backbone.lora_targets)
        name = _free_name(model)
        config = LoraConfig(
            r=self.rank,
            lora_alpha=self.rank if self.alpha is None else self.alpha,  # type: ignore[arg-type]
            target_modules=_exactly(names),
        )
        with _gradient_flags_kept(model), torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several LoRAs are welcome
            torch.manual_seed(seed)
            inject_adapter_in_model(config, model, name)
        _use_all(model)
        return AttachedLowRank(model, name, {each: _lora(model, each) for each in names})


@dataclass
class AttachedLowRank:
    """A LoRA at work. Several may be attached to one model, and undone in any order."""

    model: nn.Module
    name: str
    layers: dict[str, LoraLayer]
    params: dict[str, Parameter] = field(init=False)

    def __post_init__(self) -> None:
        self.params = {
            f"{PART}.{module}.{side}.weight": getattr(layer, side)[self.name].weight
            for module, layer in self.layers.items()
            for side in ("lora_A", "lora_B")
        }

    def state(self) -> dict[str, Tensor]:
        return {name: p.detach().to("cpu", torch.float32, copy=True) for name, p in self.params.items()}

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        check_state(self.params, state)
        for name, param in self.params.items():
            param.copy_(state[name])

    def scale(self, strength: float) -> None:
        for layer in self.layers.values():
            layer.set_scale(self.name, strength)

    def rate(self, name: str) -> float | None:
        return None

    def after_step(self) -> None:
        pass

    def undo(self) -> None:
        for name, layer in self.layers.items():
            layer.delete_adapter(self.name)
            if not layer.lora_A:
                self.model.set_submodule(name, layer.get_base_layer())
        configs: dict[str, Any] = getattr(self.model, "peft_config", {})
        configs.pop(self.name, None)
        if not configs and hasattr(self.model, "peft_config"):
            del self.model.peft_config
        self.layers = {}
        self.params = {}


def _exactly(names: Iterable[str]) -> str:
    """A regular expression that matches these names and no other; peft takes text as one."""
    return "|".join(re.escape(name) for name in names)


def _matching(model: nn.Module, regex: str) -> list[str]:
    """Names of the adaptable layers that the expression matches as a whole. Raises LiveryError for none."""
    try:
        pattern = re.compile(regex)
    except re.error as error:
        raise LiveryError(f"targets: {regex!r} is not a regular expression: {error}") from None
    layers = list(_adaptable(model))
    names = [name for name in layers if pattern.fullmatch(name)]
    if not names:
        some = ", ".join(layers[:: max(1, len(layers) // 4)][:5])
        raise LiveryError(
            f"targets: {regex!r} matches no layer; it must match whole names, and there are {some} ..."
        )
    return names


def _adaptable(model: nn.Module) -> Iterator[str]:
    """Names of linear and convolution layers; one that already has a LoRA counts, its insides do not."""
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if inside and name.startswith(inside):
            continue
        if isinstance(module, LoraLayer):
            inside = (*inside, f"{name}.")
            yield name
        elif isinstance(module, ADAPTABLE):
            yield name


def _lora(model: nn.Module, name: str) -> LoraLayer:
    layer = model.get_submodule(name)
    assert isinstance(layer, LoraLayer)
    return layer


def _free_name(model: nn.Module) -> str:
    taken = getattr(model, "peft_config", {})
    return next(name for number in itertools.count() if (name := f"livery{number}") not in taken)


def _use_all(model: nn.Module) -> None:
    """peft leaves only the newest adapter active: here every attached one acts."""
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.set_adapter(list(module.lora_A))


@contextmanager
def _gradient_flags_kept(model: nn.Module) -> Iterator[None]:
    """peft freezes all that is not its own; what other tuners train must stay as it was."""
    flags = [(param, param.requires_grad) for param in model.parameters()]
    yield
    for param, flag in flags:
        param.requires_grad_(flag)
