"""AdamW against the paper's update written out, and the schedule at its corners."""

import math

import pytest
import torch
from torch import nn

from livery.nouns import Recipe
from livery.train.optimizer import adamw, learning_rate, read_state, set_rate, write_state


def test_adamw_makes_the_update_of_the_paper():
    """Loshchilov and Hutter 2019, algorithm 2, two steps on one number."""
    recipe = Recipe(learning_rate=0.1, weight_decay=0.5)
    weight = nn.Parameter(torch.tensor([2.0]))
    optimizer = adamw([weight], recipe)
    value, first, second = 2.0, 0.0, 0.0
    for step, gradient in enumerate((3.0, -1.0), 1):
        weight.grad = torch.tensor([gradient])
        optimizer.step()
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
        direction = (first / (1 - 0.9**step)) / (math.sqrt(second / (1 - 0.999**step)) + 1e-8)
        value = value * (1 - 0.1 * 0.5) - 0.1 * direction
        assert weight.item() == pytest.approx(value, rel=1e-5)


def test_every_setting_reaches_the_optimizer():
    group = adamw([nn.Parameter(torch.zeros(1))], Recipe(learning_rate=0.3, weight_decay=0.7)).param_groups[0]
    assert (group["lr"], group["weight_decay"], group["betas"], group["eps"]) == (
        0.3,
        0.7,
        (0.9, 0.999),
        1e-8,
    )
    assert group["fused"] is True


def test_warm_up_rises_in_equal_parts_to_the_full_rate():
    recipe = Recipe(learning_rate=1.0, warmup_steps=4, steps=10)
    assert [learning_rate(recipe, step) for step in range(5)] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])


def test_cosine_passes_half_in_the_middle_and_ends_just_above_zero():
    recipe = Recipe(learning_rate=1.0, warmup_steps=0, steps=100, schedule="cosine")
    assert learning_rate(recipe, 50) == pytest.approx(0.5)
    assert 0 < learning_rate(recipe, 99) < 0.001
    rates = [learning_rate(recipe, step) for step in range(100)]
    assert rates == sorted(rates, reverse=True)


def test_constant_stays():
    recipe = Recipe(learning_rate=0.2, warmup_steps=0, steps=10, schedule="constant")
    assert {learning_rate(recipe, step) for step in range(10)} == {0.2}


def test_a_warm_up_longer_than_the_run_is_cut_off():
    assert learning_rate(Recipe(learning_rate=1.0, warmup_steps=20, steps=5), 4) == pytest.approx(0.25)


def test_the_state_goes_through_flat_tensors_and_back_bit_for_bit():
    weights = [nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(2, 2))]
    twins = [nn.Parameter(weight.detach().clone()) for weight in weights]
    recipe, names = Recipe(), ["b", "a/x"]
    one, other = adamw(weights, recipe), adamw(twins, recipe)
    _step(one, weights)
    for twin, weight in zip(twins, weights, strict=True):
        twin.data.copy_(weight.data)
    write_state(other, names, read_state(one, names))
    assert sorted(read_state(one, names)) == sorted(
        f"{name}/{key}" for name in names for key in ("step", "exp_avg", "exp_avg_sq")
    )
    _step(one, weights)
    _step(other, twins)
    assert all(torch.equal(weight, twin) for weight, twin in zip(weights, twins, strict=True))


def _step(optimizer: torch.optim.Optimizer, weights: list[nn.Parameter]) -> None:
    set_rate(optimizer, 0.01)
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    optimizer.step()
