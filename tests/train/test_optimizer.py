"""Optimisers against the papers' updates written out, schedules against diffusers', states bit for bit."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.optimization import get_scheduler
from safetensors.torch import load, save
from torch import nn

from livery.nouns import LiveryError, OptimizerSpec, Recipe
from livery.train.optimizer import build, read_state, schedule, set_rates, write_state

KINDS = ["adamw", "adafactor", "prodigy", "lion"]


def recipe(kind: str = "adamw", **values: Any) -> Recipe:
    rate = values.pop("learning_rate", 1.0 if kind == "prodigy" else 0.1)
    steps = values.pop("steps", 400)
    spec = OptimizerSpec.model_validate({"kind": kind, "warmup_steps": 0, **values})
    return Recipe(learning_rate=rate, steps=steps, optimizer=spec)


def params(seed: int = 0) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"denoiser.a/b": (3, 4), "denoiser.c": (5,), "text_encoder.tokens.<fox/s>": (2, 6)}
    return {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in shapes.items()}


def made(found: Mapping[str, nn.Parameter], wanted: Recipe) -> torch.optim.Optimizer:
    return build(found, lambda name: None, wanted)


def walk(optimizer: torch.optim.Optimizer, found: Mapping[str, nn.Parameter], steps: range) -> None:
    """Steps whose gradients hang on the step alone."""
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for param in found.values():
            param.grad = (torch.randn(param.shape, generator=generator) + 0.5).to(param.dtype)
        optimizer.step()


def test_adamw_makes_the_update_of_the_paper():
    """Loshchilov and Hutter 2019, algorithm 2, two steps on one number."""
    weight = nn.Parameter(torch.tensor([2.0]))
    optimizer = made({"denoiser.x": weight}, recipe(weight_decay=0.5))
    value, first, second = 2.0, 0.0, 0.0
    for step, gradient in enumerate((3.0, -1.0), 1):
        weight.grad = torch.tensor([gradient])
        optimizer.step()
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
        direction = (first / (1 - 0.9**step)) / (math.sqrt(second / (1 - 0.999**step)) + 1e-8)
        value = value * (1 - 0.1 * 0.5) - 0.1 * direction
        assert weight.item() == pytest.approx(value, rel=1e-5)


def test_lion_makes_the_update_of_the_paper():
    """Chen et al. 2023, algorithm 2, in numpy."""
    weight = nn.Parameter(torch.tensor([2.0, -1.0]))
    optimizer = made({"denoiser.x": weight}, recipe("lion", weight_decay=0.5))
    value, momentum = np.array([2.0, -1.0]), np.zeros(2)
    for gradient in ([3.0, 0.1], [-9.0, 0.2]):
        weight.grad = torch.tensor(gradient)
        optimizer.step()
        direction = np.sign(0.9 * momentum + 0.1 * np.array(gradient))
        value = value - 0.1 * (direction + 0.5 * value)
        momentum = 0.99 * momentum + 0.01 * np.array(gradient)
        assert weight.detach().numpy() == pytest.approx(value, rel=1e-5)


def test_adafactor_makes_the_update_of_the_paper():
    """Shazeer and Stern 2018, algorithm 4, with a rate of our own; two steps of a matrix, in numpy."""
    weight = nn.Parameter(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    optimizer = made({"denoiser.x": weight}, recipe("adafactor", weight_decay=0))
    value, rows, columns = weight.detach().numpy().copy(), np.zeros(2), np.zeros(2)
    for step, gradient in enumerate(
        (np.array([[1.0, -2.0], [0.5, 3.0]]), np.array([[0.1, 1.0], [2.0, 1.0]])), 1
    ):
        weight.grad = torch.from_numpy(gradient).float()
        optimizer.step()
        beta = 1 - step**-0.8
        square = gradient**2 + 1e-30
        rows = beta * rows + (1 - beta) * square.mean(1)
        columns = beta * columns + (1 - beta) * square.mean(0)
        update = gradient / np.sqrt(np.outer(rows, columns) / rows.mean())
        value -= 0.1 * update / max(1, np.sqrt((update**2).mean()))
        assert weight.detach().numpy() == pytest.approx(value, rel=1e-4)


def test_prodigy_finds_a_rate_near_the_best():
    """On |x| from 1, the distance to go: its d grows from 1e-6 to the order of that distance."""
    weight = nn.Parameter(torch.tensor([1.0]))
    optimizer = made({"denoiser.x": weight}, recipe("prodigy", weight_decay=0))
    for _ in range(100):
        optimizer.zero_grad()
        weight.abs().sum().backward()
        optimizer.step()
    assert 0.01 < optimizer.param_groups[0]["d"] < 2
    assert abs(weight.item()) < 0.3


@pytest.mark.parametrize("kind", KINDS)
def test_every_setting_reaches_the_optimizer(kind: str):
    betas = None if kind == "adafactor" else (0.8, 0.95)
    groups = made(params(), recipe(kind, weight_decay=0.7, betas=betas)).param_groups
    assert [group["weight_decay"] for group in groups] == [0.7, 0.0]  # the second is the new word's
    assert [len(group["params"]) for group in groups] == [2, 1]
    assert all(group.get("betas") == betas for group in groups)


def test_parameters_have_the_rates_of_their_own():
    found = params()
    optimizer = build(found, {"denoiser.c": 0.5}.get, recipe())
    assert sorted((g["lr"], len(g["params"])) for g in optimizer.param_groups) == [
        (0.1, 1),
        (0.1, 1),
        (0.5, 1),
    ]
    set_rates(optimizer, 0.5)
    assert sorted(group["lr"] for group in optimizer.param_groups) == [0.05, 0.05, 0.25]


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_through_a_file_goes_on_bit_for_bit(kind: str):
    """Three steps, a file, three more in a new process's objects, against six in one go."""
    whole, cut, wanted = params(), params(), recipe(kind)
    walk(made(whole, wanted), whole, range(6))
    first = made(cut, wanted)
    walk(first, cut, range(3))
    stored = load(save(read_state([first], cut)))
    again = {name: nn.Parameter(param.detach().clone()) for name, param in cut.items()}
    second = made(again, wanted)
    write_state([second], again, stored)
    walk(second, again, range(3, 6))
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    kept = read_state([first], cut)
    assert kept.keys() == stored.keys()
    assert all(torch.equal(kept[key], stored[key]) for key in kept)


def test_a_state_keeps_its_precision_beside_weights_of_less():
    """torch's own load_state_dict would round these moments to the weight's bf16."""
    weight = {"denoiser.x": nn.Parameter(torch.ones(3, 3, dtype=torch.bfloat16))}
    optimizer = made(weight, recipe("adafactor"))
    walk(optimizer, weight, range(2))
    before = read_state([optimizer], weight)
    other = made(weight, recipe("adafactor"))
    write_state([other], weight, before)
    after = read_state([other], weight)
    assert before["state/denoiser.x/exp_avg_sq_row"].dtype == torch.float32
    assert before.keys() == after.keys()
    assert all(
        before[key].dtype == after[key].dtype and torch.equal(before[key], after[key]) for key in before
    )


@pytest.mark.parametrize(
    ("wanted", "named"),
    [
        (recipe("adamw8bit"), "'adamw8bit' is for CUDA cards"),
        (recipe("prodigy", learning_rate=1e-3), "learning_rate 0.001 .* set it to 1"),
    ],
)
def test_what_an_optimizer_does_not_have_is_named(wanted: Recipe, named: str):
    with pytest.raises(LiveryError, match=named):
        made(params(), wanted)


def test_prodigy_takes_one_rate_for_all():
    with pytest.raises(LiveryError, match=r"one rate for all .*0\.5, 1"):
        build(params(), {"denoiser.c": 0.5}.get, recipe("prodigy"))


# ----------------------------------------------------------------------------- schedules


def test_warm_up_rises_in_equal_parts_to_the_full_rate():
    wanted = recipe(warmup_steps=4, steps=10)
    assert [schedule(wanted, step) for step in range(5)] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("constant", "constant_with_warmup"),
        ("linear", "linear"),
        ("cosine", "cosine"),
        ("cosine-restarts", "cosine_with_restarts"),
    ],
)
def test_behind_the_warm_up_schedules_are_those_of_diffusers(ours: str, theirs: str):
    wanted = recipe(schedule=ours, warmup_steps=7, restarts=3, steps=100)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    follow = get_scheduler(theirs, optimizer, num_warmup_steps=7, num_training_steps=100, num_cycles=3)
    for step in range(100):
        if step >= 7:
            assert schedule(wanted, step) == pytest.approx(follow.get_last_lr()[0], abs=1e-9)
        optimizer.step()
        follow.step()


def test_a_warm_up_longer_than_the_run_is_cut_off():
    assert schedule(recipe(warmup_steps=20, steps=5), 4) == pytest.approx(0.25)
