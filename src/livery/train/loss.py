"""The loss: one number per row, and how the rows of a step add up."""

from __future__ import annotations

import torch
from torch import Tensor

from livery.nouns import LossSpec


def row_errors(prediction: Tensor, target: Tensor, spec: LossSpec, mask: Tensor | None = None) -> Tensor:
    """Mean error of each row: two tensors [B, C, h, w] -> [B], in fp32 whatever came in.

    `mask` [B, 1, h, w] holds how much each latent cell counts, at least 0. The mean is over what counts,
    so a small mask weighs as much as a whole picture, and a mask of ones changes nothing. A row where
    nothing counts has error 0.
    """
    errors = _errors(prediction.float() - target.float(), spec)
    if mask is None:
        return errors.flatten(1).mean(1)
    counted = mask.expand_as(errors).flatten(1)
    return (errors.flatten(1) * counted).sum(1) / counted.sum(1).clamp(min=1e-6)


def _errors(difference: Tensor, spec: LossSpec) -> Tensor:
    """The square; 'huber' goes on as a straight line above `huber_delta`: Huber 1964, times 2.

    So a small error costs the same in both. Khrapov et al. 2024 (arXiv:2403.16728) on why it helps where
    some training pictures do not belong to the set.
    """
    if spec.kind == "mse":
        return difference.square()
    delta, size = spec.huber_delta, difference.abs()
    return torch.where(size <= delta, difference.square(), delta * (2 * size - delta))


def share_of_step(errors: Tensor, weights: Tensor, rows: int) -> Tensor:
    """What one batch adds to the loss of its optimiser step: a scalar.

    errors, weights [B]; `rows` counts all batches that the step accumulates, so the shares of
    these batches sum to the weighted mean over all rows, and so do their gradients.
    """
    return (errors * weights).sum() / rows
