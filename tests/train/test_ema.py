"""The running mean against diffusers' own, and what holds around it."""

import pytest
import torch
from diffusers.training_utils import EMAModel
from torch import nn

from livery.train.ema import Ema


@pytest.mark.parametrize("decay", [0.5, 0.999])
def test_it_is_the_mean_of_diffusers(decay: float):
    weights = {"a": nn.Parameter(torch.randn(3, 2)), "b": nn.Parameter(torch.randn(4))}
    ours, theirs = Ema(weights, decay), EMAModel(list(weights.values()), decay=decay)
    for step in range(1, 30):
        for weight in weights.values():
            weight.data.add_(torch.randn(weight.shape))
        ours.follow(step)
        theirs.step(weights.values())
    for mean, shadow in zip(ours.state().values(), theirs.shadow_params, strict=True):
        assert torch.allclose(mean, shadow, atol=1e-5)


def test_in_place_for_a_while_and_the_weights_come_back_bit_for_bit():
    weight = nn.Parameter(torch.tensor([1.0, 1 / 3]))
    mean = Ema({"a": weight}, 0.9)
    weight.data.mul_(3)
    before = weight.detach().clone()
    with mean.in_place():
        assert torch.equal(weight, mean.state()["a"])
        assert not torch.equal(weight, before)
    assert torch.equal(weight, before)


def test_its_state_comes_back_bit_for_bit():
    weight = nn.Parameter(torch.randn(5))
    one = Ema({"a": weight}, 0.9)
    weight.data.mul_(2)
    one.follow(20)
    other = Ema({"a": weight}, 0.9)
    other.load({name: tensor.clone() for name, tensor in one.state().items()})
    assert torch.equal(other.state()["a"], one.state()["a"])
