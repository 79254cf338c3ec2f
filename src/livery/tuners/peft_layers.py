"""Peft's layers, one adapter in each: put around layers of a model, and taken out again."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

from peft import LoHaConfig, LoKrConfig, LoraConfig, OFTConfig, PeftConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn import Parameter

from livery.nouns import LiveryError, LowRankSpec

NAME = "livery"
"""Peft's name for the adapter in its layer."""


def wrap(
    spec: LowRankSpec, model: nn.Module, ranks: Mapping[str, tuple[int, float]]
) -> dict[str, BaseTunerLayer]:
    """Put a peft layer around each named layer, of that rank and alpha, and return them by name.

    peft would join a second adapter of a kind to the first one's layer, and leave its configuration on the
    model. Made in a list of the bare layers instead, each adapter has layers of its own: whatever stands
    there already goes inside, and taking out is unlinking.
    """
    _check_kernels(spec, {name: _bare(model.get_submodule(name)) for name in ranks})
    groups: dict[tuple[int, float], list[str]] = {}
    for name, rank_and_alpha in ranks.items():
        groups.setdefault(rank_and_alpha, []).append(name)
    made: dict[str, BaseTunerLayer] = {}
    for (rank, alpha), members in groups.items():
        outer = {name: model.get_submodule(name) for name in members}
        bare = nn.ModuleList(_bare(layer) for layer in outer.values())
        with gradient_flags_kept(bare), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Invalid `oft_block_size`")  # it takes the nearest divisor
            inject_adapter_in_model(_config(spec, rank, alpha), bare, NAME)
        for name, layer in zip(members, bare, strict=True):
            assert isinstance(layer, BaseTunerLayer)
            _keep_fp32(layer)
            if spec.kind == "oft" and spec.dropout:
                _drop_blocks(layer)
            layer.base_layer = outer[name]
            model.set_submodule(name, layer)
            made[name] = layer
    return {name: made[name] for name in ranks}


def _config(spec: LowRankSpec, rank: int, alpha: float) -> PeftConfig:
    everything: dict[str, Any] = {"target_modules": r"\d+"}  # all of the list
    make: Mapping[str, Callable[[], PeftConfig]] = {
        "lora": lambda: LoraConfig(
            r=rank,
            lora_alpha=alpha,  # type: ignore[arg-type]
            lora_dropout=spec.dropout,
            use_rslora=spec.rslora,
            use_dora=spec.dora,
            **everything,
        ),
        "loha": lambda: LoHaConfig(r=rank, alpha=alpha, rank_dropout=spec.dropout, **everything),  # type: ignore[arg-type]
        "lokr": lambda: LoKrConfig(
            r=rank,
            alpha=alpha,  # type: ignore[arg-type]
            rank_dropout=spec.dropout,
            decompose_factor=spec.factor or -1,
            **everything,
        ),
        "oft": lambda: OFTConfig(
            oft_block_size=rank,
            module_dropout=spec.dropout,
            use_cayley_neumann=False,  # peft's default cuts a series short: no rotation for large weights
            **everything,
        ),
    }
    return make[spec.kind]()


def _keep_fp32(layer: Any) -> None:
    """What learns is float32 on any base: peft takes the base's own bf16, in which small steps are lost."""
    for _, param in own(layer):
        param.data = param.data.float()
    if NAME in getattr(layer, "lora_magnitude_vector", {}):
        vector = layer.lora_magnitude_vector[NAME]
        # DoRA's lengths are measured now and in each forward pass: in one precision, else W' would not be W.
        vector.get_weight_norm = partial(_norm_in_fp32, vector.get_weight_norm)
        vector.update_layer(
            base_layer=layer.get_base_layer(),
            lora_A=layer.lora_A[NAME].weight,
            lora_B=layer.lora_B[NAME].weight,
            scaling=layer.scaling[NAME],
        )


def _norm_in_fp32(
    norm: Callable[..., Tensor], weight: Tensor, lora_weight: Tensor, scaling: float, **rest: Any
) -> Tensor:
    return norm(weight=weight.float(), lora_weight=lora_weight.float(), scaling=scaling, **rest)


def _drop_blocks(layer: Any) -> None:
    """peft makes OFT's dropout of blocks, and then never calls it."""
    rotation, drop = layer.oft_R[NAME], layer.oft_dropout[NAME]
    turns = rotation._cayley_batch  # [blocks, side, side]
    rotation._cayley_batch = lambda *arguments: drop(turns(*arguments))


def own(layer: Any) -> Iterator[tuple[str, Parameter]]:
    """The adapter's parameters in a peft layer, without peft's name for the adapter."""
    for name, param in layer.named_parameters():
        if not name.startswith("base_layer."):
            yield ".".join(word for word in name.split(".") if word != NAME), param


def _bare(layer: nn.Module) -> nn.Module:
    return layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer


def take_out(model: nn.Module, name: str, layer: Any) -> None:
    """Unlink a layer from those around its place, wherever in the row it stands."""
    outer: Any = model.get_submodule(name)
    if outer is layer:
        model.set_submodule(name, layer.base_layer)
        return
    while outer.base_layer is not layer:
        outer = outer.base_layer
    outer.base_layer = layer.base_layer


def between(strength: float, layer: Any, args: Any, kwargs: Any, output: Tensor) -> Tensor:
    """A forward hook: W x + strength (W' x - W x), for kinds in which W' is no sum that peft could scale."""
    base = layer.base_layer(*args, **kwargs)
    return base + strength * (output - base)


@contextmanager
def gradient_flags_kept(model: nn.Module) -> Iterator[None]:
    """peft freezes all that is not its own; what other tuners train must stay as it was."""
    flags = [(param, param.requires_grad) for param in model.parameters()]
    yield
    for param, flag in flags:
        param.requires_grad_(flag)


def _check_kernels(spec: LowRankSpec, layers: Mapping[str, nn.Module]) -> None:
    """peft's OFT turns overlapping patches of a wider kernel and adds them up, which changes the base."""
    for name, layer in layers.items():
        if spec.kind == "oft" and isinstance(layer, nn.Conv2d) and layer.kernel_size != (1, 1):
            raise LiveryError(
                f"targets: kind 'oft' turns linear layers and 1x1 convolutions, and {name} is a "
                f"{layer.kernel_size[0]}x{layer.kernel_size[1]} one: leave it out, or take another kind"
            )
