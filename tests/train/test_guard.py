"""What stops a run and what only warns, on made-up losses, pictures and clocks."""

import math
from collections.abc import Iterator

import numpy as np
import pytest
from PIL import Image

from livery.nouns import OptimizerSpec, Recipe, StopSpec
from livery.train.guard import Pace, advice, blank, trouble

RECIPE = Recipe(stop=StopSpec(explode=10.0))


def usual(count: int = 20) -> list[float]:
    return [1.0 + 0.5 * math.sin(step) for step in range(count)]


@pytest.mark.parametrize(
    ("loss", "gradient", "what"),
    [(math.nan, 1.0, "loss became nan"), (math.inf, 1.0, "loss became inf"), (1.0, math.nan, "gradient")],
)
def test_what_is_no_number_is_trouble_at_once_and_the_step_before_was_well(
    loss: float, gradient: float, what: str
):
    found = trouble(1, [loss], gradient, RECIPE)
    assert found
    assert found[0] == 0
    assert what in found[1]


def test_three_losses_above_the_limit_in_a_row_are_an_explosion():
    found = trouble(23, [*usual(), 11.0, 40.0, 300.0], 1.0, RECIPE)
    assert found
    assert found[0] == 20
    assert "exploded after step 20: it is 300, more than 10 times the 1" in found[1]


@pytest.mark.parametrize(
    "losses",
    [
        [*usual(), 300.0],
        [*usual(), 300.0, 300.0, 1.0],
        [*usual(), 300.0, 1.0, 300.0],
        [*usual(), 9.0, 9.0, 9.0],
        [1.0, 300.0, 300.0, 300.0],
        [0.0] * 20 + [1.0] * 3,
    ],
    ids=["once", "twice", "with a pause", "below", "too early to tell", "from nothing"],
)
def test_bad_luck_is_not_an_explosion(losses: list[float]):
    assert trouble(len(losses), losses, 1.0, RECIPE) is None


def test_the_advice_names_the_change():
    recipe = Recipe(learning_rate=1e-3, optimizer=OptimizerSpec(warmup_steps=30))
    assert "lower it from 0.001 to 0.0003, or raise optimizer.warmup_steps to 60" in advice(recipe, "bf16")
    assert "set precision to 'bf16'" in advice(recipe, "fp16")
    prodigy = Recipe(learning_rate=1.0, optimizer=OptimizerSpec(kind="prodigy"))
    assert "lower learning_rate to 0.5" in advice(prodigy, "fp32")


def test_pictures_of_one_colour_are_blank_when_all_are():
    black, grey = Image.new("RGB", (8, 8)), Image.new("RGB", (8, 8), (200, 90, 90))
    drawn = Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3))
    assert blank([black, grey])
    assert not blank([black, drawn])
    assert not blank([])


def warnings_of(seconds: list[float], device: str = "cuda") -> list[tuple[int, str]]:
    """What a Pace says of steps of this length, with the number of the step."""

    def times() -> Iterator[float]:
        now = 0.0
        for length in seconds:
            yield now
            now += length
            yield now

    ticks = times()
    pace, found = Pace(lambda: next(ticks), device), []
    for step in range(len(seconds)):
        pace.start()
        if said := pace.stop():
            found.append((step + 1, said))
    return found


def test_steps_that_become_many_times_slower_are_told_once():
    (step, said), *others = warnings_of([0.5] * 15 + [6.0] * 30)
    assert step == 18
    assert "12 times as long as before (6 s, not 0.5 s)" in said
    assert "memory.checkpointing" in said
    assert not others


def test_on_a_processor_other_programs_are_the_likely_cause():
    ((_, said),) = warnings_of([0.5] * 15 + [6.0] * 30, "cpu")
    assert "other programs want the processor" in said


@pytest.mark.parametrize("seconds", [[0.5] * 15 + [6.0] + [0.5] * 15, [30.0] + [0.5] * 30, [0.5, 0.9] * 20])
def test_a_slow_step_now_and_then_is_usual(seconds: list[float]):
    assert warnings_of(seconds) == []
