"""Frozen layers stored in fewer bits: bf16, fp16, int8 or 4-bit, and read in the precision of the moment.

Only weights of frozen linear and convolution layers are stored so; biases, norms and embeddings are few
and stay float32. A stored layer is still a `Linear` or `Conv2d` with a `weight`, so any tuner wraps it. Its
backward pass reads the stored weight anew instead of keeping a copy in full precision, which is where
plain quantised layers lose what they saved.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_input

Storage = Literal["bf16", "fp16", "int8", "int4"]
HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
GROUP = 64
"""Weights that share one scale in 4-bit."""
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""The levels of NormalFloat-4: Dettmers et al. 2023 (arXiv:2305.14314), appendix E."""


def pack(weight: Tensor, storage: Storage) -> dict[str, Tensor]:
    """A float weight of any shape -> what is stored of it.

    int8: symmetric, one scale per output row. int4: NF4, one scale per `GROUP` weights in a row's order.
    """
    if storage in HALF:
        return {"codes": weight.to(HALF[storage])}
    if storage == "int8":
        rows = weight.float().flatten(1)
        scales = rows.abs().amax(1).clamp_min(1e-12) / 127
        return {"codes": (rows / scales[:, None]).round().to(torch.int8), "scales": scales}
    flat = F.pad(weight.float().flatten(), (0, -weight.numel() % (2 * GROUP))).view(-1, GROUP)
    scales = flat.abs().amax(1).clamp_min(1e-12)
    levels = torch.tensor(NF4, device=weight.device)
    nearest = torch.bucketize((flat / scales[:, None]).flatten(), (levels[1:] + levels[:-1]) / 2)
    high, low = nearest.to(torch.uint8).view(-1, 2).unbind(1)
    return {"codes": high << 4 | low, "scales": scales}


def unpack(stored: Mapping[str, Tensor], shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """The inverse of `pack`, up to its rounding, in `dtype`."""
    codes = stored["codes"]
    if codes.dtype.is_floating_point:
        return codes.to(dtype)
    if codes.dtype == torch.int8:
        return (codes.to(dtype) * stored["scales"].to(dtype)[:, None]).view(shape)
    pairs = _pairs(dtype, codes.device)[codes.int()]  # [n / 2, 2]
    scaled = pairs.view(-1, GROUP) * stored["scales"].to(dtype)[:, None]
    return scaled.flatten()[: math.prod(shape)].view(shape)


def _pairs(dtype: torch.dtype, device: torch.device) -> Tensor:
    """[256, 2]: a byte -> the two levels that its halves name."""
    levels = torch.tensor(NF4, dtype=dtype, device=device)
    return torch.stack([levels.repeat_interleave(16), levels.repeat(16)], 1)


class _Read(torch.autograd.Function):
    """A product with a stored weight; only the input gets a gradient, and nothing of it is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Any) -> Tensor:
        ctx.layer, ctx.shape = layer, x.shape
        return layer.product(x, layer.read(x.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None]:
        [gradient] = gradients
        return ctx.layer.input_gradient(ctx.shape, gradient, ctx.layer.read(gradient.dtype)), None


class _Stored(nn.Module):
    """What stored layers share."""

    bias: Tensor | None
    shape: torch.Size

    def _take(self, layer: nn.Linear | nn.Conv2d, storage: Storage) -> None:
        nn.Module.__init__(self)
        self.shape = layer.weight.shape
        for name, part in pack(layer.weight.detach(), storage).items():
            self.register_buffer(name, part, persistent=False)
        self.bias = layer.bias
        self.train(layer.training)

    @property
    def weight(self) -> Tensor:
        """As it would be in float32."""
        return self.read(torch.float32)

    def read(self, dtype: torch.dtype) -> Tensor:
        return unpack(dict(self.named_buffers(recurse=False)), self.shape, dtype)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's own name
        kind = input.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else input.dtype
        return cast(Tensor, _Read.apply(input.to(dtype), self))

    def _bias(self, dtype: torch.dtype) -> Tensor | None:
        return None if self.bias is None else self.bias.to(dtype)


class StoredLinear(_Stored, nn.Linear):  # pyright: ignore[reportIncompatibleVariableOverride]
    def __init__(self, layer: nn.Linear, storage: Storage) -> None:
        self._take(layer, storage)
        self.in_features, self.out_features = layer.in_features, layer.out_features

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight, self._bias(x.dtype))

    def input_gradient(self, shape: torch.Size, gradient: Tensor, weight: Tensor) -> Tensor:
        return gradient @ weight


class StoredConv2d(_Stored, nn.Conv2d):  # pyright: ignore[reportIncompatibleVariableOverride]
    def __init__(self, layer: nn.Conv2d, storage: Storage) -> None:
        self._take(layer, storage)
        self.in_channels, self.out_channels = layer.in_channels, layer.out_channels
        self.kernel_size, self.stride, self.dilation = layer.kernel_size, layer.stride, layer.dilation
        self.padding, self.padding_mode, self.groups = layer.padding, layer.padding_mode, layer.groups
        self.transposed, self.output_padding = layer.transposed, layer.output_padding

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.conv2d(x, weight, self._bias(x.dtype), self.stride, self.padding, self.dilation, self.groups)

    def input_gradient(self, shape: torch.Size, gradient: Tensor, weight: Tensor) -> Tensor:
        # Its stub takes single numbers only; the function takes tuples.
        gradient_of: Any = conv2d_input
        return gradient_of(shape, weight, gradient, self.stride, self.padding, self.dilation, self.groups)


def stored(layer: nn.Module, storage: Storage) -> nn.Module | None:
    """The stored form of a frozen layer; none for a layer that trains, or is of another kind."""
    if type(layer) not in (nn.Linear, nn.Conv2d):
        return None
    whole = cast(nn.Linear | nn.Conv2d, layer)
    if any(param.requires_grad for param in whole.parameters()):
        return None
    if isinstance(whole, nn.Conv2d):
        usual = whole.padding_mode == "zeros" and not isinstance(whole.padding, str)
        return StoredConv2d(whole, storage) if usual else None
    return StoredLinear(whole, storage)
