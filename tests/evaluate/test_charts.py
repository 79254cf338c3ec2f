"""Geometry and wording of the page's numbers."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from livery.evaluate import charts, verdict
from livery.evaluate.wording import duration, learning, megabytes
from livery.nouns import Interval, Validation
from tests.evaluate.test_report import run_of


@given(st.lists(st.floats(-1, 1), min_size=1, max_size=8))
def test_an_axis_holds_its_values_and_has_few_ticks(values: list[float]):
    axis = charts.Axis.around(values)
    assert axis.low <= min(values) + 1e-9
    assert axis.high >= max(values) - 1e-9
    assert 2 <= len(axis.ticks) <= 7
    assert all(-0.01 <= axis.place(value) <= 100.01 for value in values)


def test_round_steps_are_round():
    assert [charts.round_step(rough) for rough in (0.1, 0.11, 0.03, 3, 60)] == [0.1, 0.2, 0.05, 5, 100]


def test_smoothing_keeps_length_and_mean_level():
    assert charts.smoothed([1.0] * 7) == [1.0] * 7
    assert charts.smoothed([0, 3, 0, 3, 0], window=3) == [1.5, 1, 2, 1, 1.5]
    assert charts.smoothed([]) == []


def test_thinning_keeps_the_ends():
    points = [(float(n), 0.0) for n in range(1000)]
    thin = charts.thinned(points)
    assert len(thin) <= 241
    assert (thin[0], thin[-1]) == (points[0], points[-1])


def test_curves_start_left_and_end_right():
    found = charts.curves(run_of())
    assert found is not None
    assert [x for x, _ in found.points] == [0, 50, 100]
    assert [text for _, text in found.x_ticks] == ["0", "20", "40"]
    assert found.points[0][1] < found.points[-1][1]  # the loss falls, so y grows downwards
    assert charts.curves(run_of(steps=(), validations=())) is None


@pytest.mark.parametrize(
    ("losses", "said"),
    [
        ([0.5, 0.4, 0.3], "did not rise again"),
        ([0.5, 0.3, 0.4], "rose again after it: fewer steps"),
        ([0.3, 0.4, 0.5], "never fell below where it began"),
        ([0.3], ""),
    ],
)
def test_learning_is_told_as_it_went(losses: list[float], said: str):
    checks = tuple(Validation(step=n * 10, loss=loss) for n, loss in enumerate(losses))
    found = learning(run_of(validations=checks))
    assert said in found
    assert bool(said) == bool(found)


def test_numbers_read_well():
    made = Interval(value=0.9349, low=0.88, high=0.999, n=60)
    assert verdict.share(made) == "93% (88–99%)"  # not 100: one picture missed
    loss = Interval(value=-0.07, low=-0.14, high=0.0, n=60)
    assert verdict.points(loss) == "−7 points (−14 to 0)"
    assert verdict.change(loss) == "−0.07 (−0.14 to 0.00)"
    assert verdict.minus("-0.00") == "0.00"
    assert [duration(s) for s in (4.2, 60, 200, 7500)] == ["4 s", "1 min", "3 min 20 s", "2 h 5 min"]
    assert [megabytes(n) for n in (640_000_000, 2_140_000_000)] == ["640 MB", "2.1 GB"]
