"""The loss: one number per row, and how the rows of a step add up."""

from __future__ import annotations

import torch
from torch import Tensor


def row_errors(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of each row: two tensors [B, ...] -> [B], in fp32 whatever came in."""
    return (prediction.float() - target.float()).square().flatten(1).mean(1)


def share_of_step(errors: Tensor, weights: Tensor, rows: int) -> Tensor:
    """What one batch adds to the loss of its optimiser step: a scalar.

    errors, weights [B]; `rows` counts all batches that the step accumulates, so the shares of
    these batches sum to the weighted mean over all rows, and so do their gradients.
    """
    return (errors * weights).sum() / rows


def noise_weights(weights: Tensor, photo_weights: list[float]) -> Tensor:
    """The noise law's weights [B] times the photos' own."""
    return weights * torch.tensor(photo_weights, dtype=torch.float32, device=weights.device)
