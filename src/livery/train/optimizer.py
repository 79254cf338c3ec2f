"""AdamW and the learning rate, as functions of the recipe."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from livery.nouns import Recipe


def adamw(params: Iterable[nn.Parameter], recipe: Recipe) -> torch.optim.AdamW:
    """Decoupled weight decay (Loshchilov and Hutter 2019, arXiv:1711.05101), one fused kernel per step."""
    return torch.optim.AdamW(
        list(params), lr=recipe.learning_rate, weight_decay=recipe.optimizer.weight_decay, fused=True
    )


def learning_rate(recipe: Recipe, step: int) -> float:
    """The rate of step 0, 1, ...: a linear warm-up, then constant or a cosine to 0 after the last."""
    if step < recipe.optimizer.warmup_steps:
        return recipe.learning_rate * (step + 1) / recipe.optimizer.warmup_steps
    if recipe.optimizer.schedule == "constant":
        return recipe.learning_rate
    done = (step - recipe.optimizer.warmup_steps) / max(1, recipe.steps - recipe.optimizer.warmup_steps)
    return recipe.learning_rate * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


def read_state(optimizer: torch.optim.Optimizer, names: list[str]) -> dict[str, Tensor]:
    """The optimiser's moments as flat tensors, "name/exp_avg" and so on; `names` in parameter order."""
    state = optimizer.state_dict()["state"]
    return {
        f"{names[index]}/{key}": torch.as_tensor(value)
        for index, values in state.items()
        for key, value in values.items()
    }


def write_state(optimizer: torch.optim.Optimizer, names: list[str], tensors: dict[str, Tensor]) -> None:
    """Put back what `read_state` gave."""
    state: dict[int, dict[str, Tensor]] = {}
    for path, tensor in tensors.items():
        name, key = path.rsplit("/", 1)
        state.setdefault(names.index(name), {})[key] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
