"""Optimisers and learning rates, as functions of the recipe; an optimiser's state as plain tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from livery.nouns import LiveryError, OptimizerSpec, Recipe

Group = dict[str, Any]
Rate = Callable[[str], float | None]
"""A parameter's name -> the learning rate of its own; none = the recipe's."""
SLOWEST_PRODIGY = 0.1
"""Below this, a learning_rate is meant for another optimiser: Prodigy's is a factor on the rate it finds."""


def build(params: Mapping[str, Parameter], rate: Rate, recipe: Recipe) -> torch.optim.Optimizer:
    """The recipe's optimiser over parameters by name.

    Raises LiveryError for settings that an optimiser does not have, and where its package or its
    hardware is not there.
    """
    groups, spec = _groups(params, rate, recipe), recipe.optimizer
    match spec.kind:
        case "adamw":
            return _adamw(groups, spec)
        case "adamw8bit":
            return _adamw8bit(groups, spec)
        case "adafactor":
            return _adafactor(groups)
        case "prodigy":
            return _prodigy(groups, spec)
        case "lion":
            return _lion(groups, spec)


def _groups(params: Mapping[str, Parameter], rate: Rate, recipe: Recipe) -> list[Group]:
    """Parameters by learning rate and weight decay; `full_rate` is the rate before the schedule.

    The vectors of new words, "<tower>.tokens.<word>", do not decay: it would pull them away from all words.
    """
    found: dict[tuple[float, float], list[Parameter]] = {}
    for name, param in params.items():
        of_a_word = name.partition(".")[2].startswith("tokens.")
        decay = 0.0 if of_a_word else recipe.optimizer.weight_decay
        found.setdefault((rate(name) or recipe.learning_rate, decay), []).append(param)
    return [
        {"params": members, "lr": full, "full_rate": full, "weight_decay": decay}
        for (full, decay), members in found.items()
    ]


def _adamw(groups: list[Group], spec: OptimizerSpec) -> torch.optim.Optimizer:
    """Decoupled weight decay (Loshchilov and Hutter 2019, arXiv:1711.05101), one fused kernel per step."""
    return torch.optim.AdamW(groups, betas=spec.betas or (0.9, 0.999), fused=True)


def _adamw8bit(groups: list[Group], spec: OptimizerSpec) -> torch.optim.Optimizer:
    """AdamW with its moments in 8 bits: Dettmers et al. 2022 (arXiv:2110.02861)."""
    device = groups[0]["params"][0].device
    if device.type != "cuda":
        raise LiveryError(
            f"optimizer.kind 'adamw8bit' is for CUDA cards, this is {device.type}: take 'adamw'"
        )
    try:
        from bitsandbytes.optim import AdamW8bit  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise LiveryError(
            "optimizer.kind 'adamw8bit' needs a package: run  pip install 'livery[cuda]'  or take 'adamw'"
        ) from error
    return AdamW8bit(groups, betas=spec.betas or (0.9, 0.999))


def _adafactor(groups: list[Group]) -> torch.optim.Optimizer:
    """Second moments by row and column: Shazeer and Stern 2018 (arXiv:1804.04235), with our own rates."""
    from transformers.optimization import Adafactor

    return Adafactor(groups, lr=groups[0]["lr"], scale_parameter=False, relative_step=False)


def _prodigy(groups: list[Group], spec: OptimizerSpec) -> torch.optim.Optimizer:
    """Finds its rate: Mishchenko and Defazio 2023 (arXiv:2306.06101); `learning_rate` is a factor on that."""
    from prodigyopt import Prodigy

    rates = sorted({group["lr"] for group in groups})
    if len(rates) > 1:
        raise LiveryError(
            "optimizer.kind 'prodigy' finds one rate for all that learns: give tuners and text encoders the "
            f"recipe's learning_rate (there are {', '.join(f'{rate:g}' for rate in rates)})"
        )
    if rates[0] < SLOWEST_PRODIGY:
        raise LiveryError(
            f"learning_rate {rates[0]:g} with optimizer.kind 'prodigy' learns nothing: it is a factor "
            "on the rate that Prodigy finds; set it to 1"
        )
    # What its authors advise for diffusion models.
    return Prodigy(groups, betas=spec.betas or (0.9, 0.999), use_bias_correction=True, safeguard_warmup=True)


def _lion(groups: list[Group], spec: OptimizerSpec) -> torch.optim.Optimizer:
    """The sign of a momentum: Chen et al. 2023 (arXiv:2302.06675); wants a 3 to 10 times lower rate."""
    from lion_pytorch import Lion

    return Lion(groups, lr=groups[0]["lr"], betas=spec.betas or (0.9, 0.99))


# ---------------------------------------------------------------------------- learning rates


def schedule(recipe: Recipe, step: int) -> float:
    """The share of the full rate in step 0, 1, ...: a linear warm-up, then the recipe's schedule.

    'cosine' and 'linear' fall to 0 after the last step; 'cosine-restarts' falls so in each of its cycles
    of equal length (Loshchilov and Hutter 2017, arXiv:1608.03983, with T_mult 1).
    """
    spec = recipe.optimizer
    if step < spec.warmup_steps:
        return (step + 1) / spec.warmup_steps
    done = min(1.0, (step - spec.warmup_steps) / max(1, recipe.steps - spec.warmup_steps))
    match spec.schedule:
        case "constant":
            return 1.0
        case "linear":
            return 1 - done
        case "cosine":
            return _half_cosine(done)
        case "cosine-restarts":
            return _half_cosine(done * spec.restarts % 1)


def _half_cosine(done: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * done))


def set_rates(optimizer: torch.optim.Optimizer, share: float) -> None:
    """Every group's rate becomes this share of its full one."""
    for group in optimizer.param_groups:
        group["lr"] = group["full_rate"] * share


# ---------------------------------------------------------------------------- state


def read_state(
    optimizers: Sequence[torch.optim.Optimizer], params: Mapping[str, Parameter]
) -> dict[str, Tensor]:
    """All that optimisers remember, as tensors: "state/<parameter>/exp_avg", "group/0.0/d=".

    A key with "=" is a number that an optimiser keeps beside its tensors, such as Prodigy's d or a count of
    steps: an int64 or float64 scalar, which holds it exactly.
    """
    found: dict[str, Tensor] = {}
    for number, optimizer in enumerate(optimizers):
        for name, param in params.items():
            for key, value in optimizer.state.get(param, {}).items():
                found |= _entry(f"state/{name}/{key}", value)
        for index, group in enumerate(optimizer.param_groups):
            for key, value in group.items():
                found |= _entry(f"group/{number}.{index}/{key}", value) if key != "params" else {}
    return found


def write_state(
    optimizers: Sequence[torch.optim.Optimizer],
    params: Mapping[str, Parameter],
    tensors: Mapping[str, Tensor],
) -> None:
    """Put back what `read_state` gave, bit for bit: no cast to a parameter's own dtype, as torch would."""
    owners = {
        param: optimizer
        for optimizer in optimizers
        for group in optimizer.param_groups
        for param in group["params"]
    }
    for path, tensor in tensors.items():
        room, _, rest = path.partition("/")
        name, _, key = rest.rpartition("/")
        if room == "state":
            param = params[name]
            value = tensor.item() if key.endswith("=") else tensor.detach().clone().to(param.device)
            owners[param].state[param][key.removesuffix("=")] = value
        else:
            number, index = map(int, name.split("."))
            optimizers[number].param_groups[index][key.removesuffix("=")] = tensor.item()


def _entry(path: str, value: Any) -> dict[str, Tensor]:
    if isinstance(value, Tensor):
        return {path: value}
    if isinstance(value, int | float) and not isinstance(value, bool):
        kind = torch.int64 if isinstance(value, int) else torch.float64
        return {f"{path}=": torch.tensor(value, dtype=kind)}
    return {}  # a setting that the recipe brings again
