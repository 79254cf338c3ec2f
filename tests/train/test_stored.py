"""Stored layers: rounding errors of known size, products and gradients of the plain formula."""

import math
from typing import Any

import pytest
import torch
from torch import nn

from livery.train.stored import GROUP, NF4, pack, stored, unpack

ROUNDING: Any = {"bf16": 2**-8, "fp16": 2**-11}


@pytest.mark.parametrize("storage", ["bf16", "fp16"])
def test_halves_round_to_their_own_precision(storage: Any):
    weight = torch.randn(7, 3, 3, 3)
    back = unpack(pack(weight, storage), weight.shape, torch.float32)
    assert ((back - weight).abs() <= weight.abs() * ROUNDING[storage]).all()


def test_int8_is_within_half_a_step_of_each_rows_largest():
    weight = torch.randn(9, 31) * torch.arange(1, 10)[:, None]
    parts = pack(weight, "int8")
    assert parts["codes"].dtype == torch.int8
    back = unpack(parts, weight.shape, torch.float32)
    step = weight.abs().amax(1, keepdim=True) / 127
    assert ((back - weight).abs() <= step / 2 * 1.001).all()


def test_int4_takes_half_a_byte_and_the_nearest_of_the_sixteen_levels():
    weight = torch.randn(5, 77)
    parts = pack(weight, "int4")
    assert parts["codes"].numel() == math.ceil(weight.numel() / (2 * GROUP)) * GROUP
    back = unpack(parts, weight.shape, torch.float32).flatten()
    for first in range(0, weight.numel(), GROUP):
        group = weight.flatten()[first : first + GROUP]
        scaled = torch.tensor(NF4) * group.abs().max()
        nearest = scaled[(group[:, None] - scaled).abs().argmin(1)]
        assert torch.allclose(back[first : first + GROUP], nearest, atol=1e-6)


def test_the_levels_are_the_normal_distributions_quantiles():
    """QLoRA, appendix E: means of neighbouring quantiles' edges, apart for each sign, made to end at 1."""
    edge = 0.5 * ((1 - 1 / 30) + (1 - 1 / 32))
    normal = torch.distributions.Normal(0, 1)
    above = normal.icdf(torch.linspace(edge, 0.5, 9, dtype=torch.float64)[:-1])
    below = -normal.icdf(torch.linspace(edge, 0.5, 8, dtype=torch.float64)[:-1])
    levels = torch.cat([above, below, torch.zeros(1, dtype=torch.float64)]).sort().values
    assert torch.allclose(levels / levels.max(), torch.tensor(NF4, dtype=torch.float64), atol=1e-4)


LAYERS = {
    "linear": (lambda: nn.Linear(6, 5), (2, 3, 6)),
    "without bias": (lambda: nn.Linear(6, 5, bias=False), (4, 6)),
    "convolution": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), (2, 4, 9, 8)),
}


@pytest.mark.parametrize("storage", ["bf16", "fp16", "int8", "int4"])
@pytest.mark.parametrize("name", LAYERS)
def test_a_stored_layer_is_the_layer_with_rounded_weights(name: str, storage: Any):
    """Output and the input's gradient, bit for bit what autograd gives for the plain layer."""
    make, shape = LAYERS[name]
    plain = make().requires_grad_(False)
    small: Any = stored(plain, storage)
    assert isinstance(small, type(plain))
    plain.weight.data = small.weight
    one, other = (torch.randn(shape, generator=torch.Generator().manual_seed(1)) for _ in range(2))
    for x, layer in ((one.requires_grad_(), plain), (other.requires_grad_(), small)):
        layer(x).square().sum().backward()
    assert torch.allclose(plain(one), small(other), atol=1e-6)
    assert torch.allclose(one.grad, other.grad, atol=1e-5)  # pyright: ignore[reportArgumentType]


def test_under_autocast_it_computes_as_the_plain_layer_does():
    plain = nn.Linear(16, 16).requires_grad_(False)
    x = torch.randn(3, 16)
    small = stored(plain, "bf16")
    assert small is not None
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(plain(x), small(x))
        assert small(x).dtype == torch.bfloat16
    assert small(x).dtype == torch.float32


def test_nothing_of_the_weight_is_kept_for_the_backward_pass():
    sizes: list[int] = []
    small = stored(nn.Linear(64, 64).requires_grad_(False), "int8")
    assert small is not None
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        small(torch.randn(2, 64, requires_grad=True))
    assert sizes == []


def test_what_trains_or_is_no_plain_layer_is_left_alone():
    assert stored(nn.Linear(4, 4), "int8") is None
    assert stored(nn.LayerNorm(4).requires_grad_(False), "int8") is None
    assert (
        stored(nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular").requires_grad_(False), "bf16") is None
    )
