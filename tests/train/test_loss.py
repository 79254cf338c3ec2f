"""The loss against the formulas written out with loops and numbers."""

import pytest
import torch

from livery.train.loss import noise_weights, row_errors, share_of_step


def test_row_errors_is_the_mean_square_of_each_row():
    prediction = torch.arange(24.0).reshape(2, 3, 2, 2)
    target = torch.zeros_like(prediction)
    expected = [sum(n * n for n in range(12)) / 12, sum(n * n for n in range(12, 24)) / 12]
    assert row_errors(prediction, target).tolist() == pytest.approx(expected)


def test_row_errors_are_counted_in_fp32_whatever_came_in():
    prediction = torch.full((1, 1, 100, 100), 0.1, dtype=torch.bfloat16)
    errors = row_errors(prediction, torch.zeros(1, 1, 100, 100))
    assert errors.dtype == torch.float32
    assert errors.item() == pytest.approx(float(torch.tensor(0.1, dtype=torch.bfloat16)) ** 2, rel=1e-5)


def test_shares_of_unequal_weights_sum_to_the_weighted_mean_over_all_rows():
    errors, weights = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([1.0, 0.5, 0.0, 2.0])
    parts = [share_of_step(errors[i : i + 2], weights[i : i + 2], 4) for i in (0, 2)]
    assert float(sum(parts)) == pytest.approx((1 * 1 + 2 * 0.5 + 0 + 4 * 2) / 4)


def test_noise_weights_multiply():
    assert noise_weights(torch.tensor([0.5, 1.0]), [2.0, 3.0]).tolist() == [1.0, 3.0]
