"""How sure are we? Bootstrap intervals over prompts, and over paired differences.

The prompt is what was sampled, so all pictures of one prompt stand or fall together (cluster
bootstrap: Cameron, Gelbach and Miller 2008, section III; percentile limits: Efron 1979). Where
all pictures agree the interval has no width; with n prompts the truth may still differ by about
3/n (rule of three).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from livery.nouns import Interval, LiveryError

ROUNDS = 4000
LEVEL = 0.95


def interval(values: ArrayLike, prompts: Sequence[int], *, seed: int = 0, rounds: int = ROUNDS) -> Interval:
    """Mean of `values` [N] with its 95% percentile interval; prompts: N prompt numbers.

    Raises LiveryError when there is no value or the lengths differ.
    """
    sums, counts = _by_prompt(np.asarray(values, dtype=np.float64), np.asarray(prompts))
    means = _bootstrap(sums, counts, seed, rounds)
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    value = sums.sum() / counts.sum()
    return Interval(value=_clean(value), low=_clean(low), high=_clean(high), n=len(sums))


def difference(
    values: ArrayLike, others: ArrayLike, prompts: Sequence[int], *, seed: int = 0, rounds: int = ROUNDS
) -> Interval:
    """Mean of `values - others`, paired row by row (same prompt, same seed), with its 95% interval."""
    first, second = np.asarray(values, dtype=np.float64), np.asarray(others, dtype=np.float64)
    if first.shape != second.shape:
        raise LiveryError(
            f"paired values differ in number ({first.size} and {second.size}); pair them first."
        )
    return interval(first - second, prompts, seed=seed, rounds=rounds)


def _by_prompt(
    values: NDArray[np.float64], prompts: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.intp]]:
    """Sum and number of the values of each prompt: [P], [P]."""
    if values.ndim != 1 or values.size == 0 or values.shape != prompts.shape:
        raise LiveryError(f"an interval needs one prompt per value; got {values.size} and {prompts.size}.")
    _, number = np.unique(prompts, return_inverse=True)
    return np.bincount(number, weights=values).astype(np.float64), np.bincount(number)


def _bootstrap(
    sums: NDArray[np.float64], counts: NDArray[np.intp], seed: int, rounds: int
) -> NDArray[np.float64]:
    """Means over `rounds` resamplings of the prompts: [rounds]."""
    drawn = np.random.default_rng(seed).integers(0, len(sums), size=(rounds, len(sums)))
    return sums[drawn].sum(1) / counts[drawn].sum(1)


def _clean(value: float) -> float:
    """Twelve decimals: takes the last bits of rounding error out of ids and of 'is it above 0?'."""
    return round(float(value), 12) + 0.0
