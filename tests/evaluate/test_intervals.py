"""Intervals on data whose answer is known. Coverage is checked roughly: within a few points of 95%."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from livery.evaluate.intervals import difference, interval
from livery.nouns import LiveryError


def test_the_mean_is_the_mean_and_n_counts_prompts():
    found = interval([1, 0, 1, 1], [0, 0, 1, 1])
    assert (found.value, found.n) == (0.75, 2)


def test_it_covers_the_truth_about_95_times_in_100():
    rng, hits, trials = np.random.default_rng(1), 0, 400
    for trial in range(trials):
        prompt = np.repeat(np.arange(60), 2)
        values = rng.normal(0.3, 1, 60)[prompt] + rng.normal(0, 0.5, 120)  # seeds of a prompt agree
        found = interval(values, prompt.tolist(), seed=trial, rounds=500)
        hits += found.low <= 0.3 <= found.high
    assert 0.91 <= hits / trials <= 0.98


def test_pictures_of_one_prompt_are_not_counted_as_independent():
    """Ten copies of each prompt's value add no knowledge: the interval stays as wide."""
    values = np.random.default_rng(2).normal(0, 1, 30)
    once = interval(values, list(range(30)))
    often = interval(np.repeat(values, 10), np.repeat(np.arange(30), 10).tolist())
    assert often.high - often.low == pytest.approx(once.high - once.low, rel=1e-6)


def test_pairing_sees_a_small_gain_under_large_differences_between_prompts():
    rng = np.random.default_rng(3)
    hard, prompts = rng.normal(0, 5, 60), list(range(60))
    gain = difference(hard + 0.2 + rng.normal(0, 0.1, 60), hard, prompts)
    assert gain.low > 0.1
    assert gain.high < 0.3
    assert interval(hard + 0.2, prompts).low < 0 < interval(hard, prompts).high


def test_no_difference_is_not_called_one():
    rng, wrong, trials = np.random.default_rng(4), 0, 200
    for trial in range(trials):
        a, b = rng.normal(0, 1, (2, 60))
        wrong += difference(a, b, list(range(60)), seed=trial, rounds=500).low > 0
    assert wrong / trials < 0.06  # 2.5% by design


def test_the_same_seed_gives_the_same_interval():
    values, prompts = np.random.default_rng(5).random(40), list(range(40))
    assert interval(values, prompts, seed=7) == interval(values, prompts, seed=7)
    assert interval(values, prompts, seed=7) != interval(values, prompts, seed=8)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(st.floats(-1, 1), st.integers(0, 5)), min_size=1, max_size=40),
    st.floats(-2, 2),
)
def test_invariants(rows: list[tuple[float, int]], shift: float):
    values, prompts = [v for v, _ in rows], [p for _, p in rows]
    found = interval(values, prompts, rounds=200)
    assert min(values) - 1e-9 <= found.low <= found.high <= max(values) + 1e-9
    moved = interval([v + shift for v in values], prompts, rounds=200)
    assert moved.low == pytest.approx(found.low + shift, abs=1e-9)
    relabelled = interval(values, [p * 7 + 3 for p in prompts], rounds=200)
    assert relabelled == found
    nothing = difference(values, values, prompts, rounds=200)
    assert (nothing.value, nothing.low, nothing.high) == (0, 0, 0)


@pytest.mark.parametrize(("values", "prompts"), [([], []), ([1.0], [0, 1])])
def test_values_without_prompts_are_refused(values: list[float], prompts: list[int]):
    with pytest.raises(LiveryError, match="one prompt per value"):
        interval(values, prompts)
    with pytest.raises(LiveryError, match="pair them"):
        difference([1.0], [1.0, 2.0], [0])
