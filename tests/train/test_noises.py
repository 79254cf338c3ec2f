"""Noises against the same written out in numpy on the same numbers, and what they do to pictures."""

import numpy as np
import pytest
import torch

from livery.nouns import NoiseSpec
from livery.train.noises import draw_noise, perturbed

SHAPE = (4, 12, 8)


def random(seed: int = 5) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_plain_noise_is_gaussian_and_its_generators():
    assert torch.equal(draw_noise(SHAPE, random(), NoiseSpec()), torch.randn(SHAPE, generator=random()))


def test_offset_noise_adds_one_number_per_channel():
    """As in the article: torch.randn_like(latents) + 0.1 * torch.randn(B, C, 1, 1)."""
    numbers = random()
    plain, constant = (
        torch.randn(SHAPE, generator=numbers).numpy(),
        torch.randn(4, 1, 1, generator=numbers).numpy(),
    )
    drawn = draw_noise(SHAPE, random(), NoiseSpec(offset=0.1)).numpy()
    assert drawn == pytest.approx(plain + 0.1 * constant, abs=1e-6)


def test_a_picture_of_offset_noise_has_a_mean_of_that_strength():
    drawn = torch.stack([draw_noise((1, 32, 32), random(seed), NoiseSpec(offset=0.5)) for seed in range(400)])
    assert drawn.mean((1, 2, 3)).std().item() == pytest.approx((0.5**2 + 1 / 1024) ** 0.5, rel=0.1)


def _enlarged(small: np.ndarray, height: int, width: int) -> np.ndarray:
    """Bilinear, by loops: sample points in the middle of pixels, edges repeated."""
    rows, columns = small.shape
    found = np.zeros((height, width))
    for y in range(height):
        for x in range(width):
            down = min(max((y + 0.5) * rows / height - 0.5, 0), rows - 1)
            right = min(max((x + 0.5) * columns / width - 0.5, 0), columns - 1)
            top, left = int(down), int(right)
            bottom, side = min(top + 1, rows - 1), min(left + 1, columns - 1)
            dy, dx = down - top, right - left
            found[y, x] = (
                small[top, left] * (1 - dy) * (1 - dx)
                + small[top, side] * (1 - dy) * dx
                + small[bottom, left] * dy * (1 - dx)
                + small[bottom, side] * dy * dx
            )
    return found


def test_pyramid_noise_adds_coarser_noises_and_is_brought_back_to_spread_one():
    numbers = random()
    total = torch.randn(SHAPE, generator=numbers).double().numpy()
    for octave, (height, width) in enumerate(((6, 4), (3, 2), (1, 1)), 1):
        coarse = torch.randn(1, 4, height, width, generator=numbers).double().numpy()[0]
        total += 0.3**octave * np.stack([_enlarged(channel, 12, 8) for channel in coarse])
    drawn = draw_noise(SHAPE, random(), NoiseSpec(pyramid=0.3)).numpy()
    assert drawn == pytest.approx(total / total.std(ddof=1), abs=1e-5)
    assert drawn.std() == pytest.approx(1, abs=0.01)


def test_input_perturbation_adds_a_noise_of_its_own_and_only_when_asked():
    numbers = random()
    noise = draw_noise(SHAPE, numbers, NoiseSpec())
    before = numbers.get_state()
    assert perturbed(noise, numbers, NoiseSpec()) is noise
    assert torch.equal(numbers.get_state(), before)
    other = torch.randn(SHAPE, generator=random(6)).numpy()
    found = perturbed(noise, random(6), NoiseSpec(input_perturbation=0.1))
    assert found.numpy() == pytest.approx(noise.numpy() + 0.1 * other, abs=1e-6)
