"""The loss against the same sums in plain loops."""

import numpy as np
import pytest
import torch

from livery.nouns import LossSpec
from livery.train.loss import row_errors, share_of_step

MSE, HUBER = LossSpec(), LossSpec(kind="huber", huber_delta=0.7)


def rows(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, 2, 4, 5, generator=generator), torch.randn(3, 2, 4, 5, generator=generator)


def test_row_errors_is_the_mean_square_of_each_row():
    prediction = torch.tensor([[[[1.0, 2.0]]], [[[0.0, 0.0]]]])
    target = torch.tensor([[[[3.0, 2.0]]], [[[1.0, 1.0]]]])
    assert row_errors(prediction, target, MSE).tolist() == pytest.approx([2.0, 1.0])


def test_row_errors_are_counted_in_fp32_whatever_came_in():
    prediction = torch.full((1, 1, 100, 100), 0.1, dtype=torch.bfloat16)
    errors = row_errors(prediction, torch.zeros(1, 1, 100, 100), MSE)
    assert errors.dtype == torch.float32
    assert errors.item() == pytest.approx(float(prediction[0, 0, 0, 0]) ** 2, rel=1e-5)


def test_huber_is_twice_torchs_and_so_equal_to_the_square_where_errors_are_small():
    prediction, target = rows()
    theirs = 2 * torch.nn.functional.huber_loss(prediction, target, reduction="none", delta=0.7)
    assert torch.allclose(row_errors(prediction, target, HUBER), theirs.flatten(1).mean(1))
    near = target + 0.1
    assert torch.allclose(row_errors(near, target, HUBER), row_errors(near, target, MSE))


@pytest.mark.parametrize("spec", [MSE, HUBER])
def test_a_mask_counts_cells_as_a_loop_does(spec: LossSpec):
    prediction, target = rows()
    mask = torch.rand(3, 1, 4, 5, generator=torch.Generator().manual_seed(1))
    for row, error in enumerate(row_errors(prediction, target, spec, mask).tolist()):
        total = counted = 0.0
        for channel, y, x in np.ndindex(2, 4, 5):
            off = abs(float(prediction[row, channel, y, x] - target[row, channel, y, x]))
            plain = off**2 if spec.kind == "mse" or off <= 0.7 else 2 * 0.7 * off - 0.7**2
            total += float(mask[row, 0, y, x]) * plain
            counted += float(mask[row, 0, y, x])
        assert error == pytest.approx(total / counted, rel=1e-4)


def test_a_mask_of_ones_changes_nothing_and_one_of_zeros_counts_nothing():
    prediction, target = rows()
    ones = row_errors(prediction, target, MSE, torch.ones(3, 1, 4, 5))
    assert torch.allclose(ones, row_errors(prediction, target, MSE))
    assert row_errors(prediction, target, MSE, torch.zeros(3, 1, 4, 5)).tolist() == [0, 0, 0]


def test_what_a_mask_hides_has_no_gradient():
    prediction, target = rows()
    prediction.requires_grad_()
    mask = torch.zeros(3, 1, 4, 5)
    mask[:, :, 1:3, 2] = 1
    row_errors(prediction, target, MSE, mask).sum().backward()
    assert prediction.grad is not None
    assert bool((prediction.grad != 0).eq(mask.expand_as(prediction) > 0).all())


def test_the_shares_of_a_steps_batches_sum_to_the_weighted_mean():
    errors, weights = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([1.0, 0.5, 2.0, 0.0])
    parts = [share_of_step(errors[i : i + 2], weights[i : i + 2], 4) for i in (0, 2)]
    assert float(sum(parts)) == pytest.approx((1 * 1 + 2 * 0.5 + 3 * 2) / 4)
