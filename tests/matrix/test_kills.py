"""Every family x tuner: a training that SIGKILL cut goes on and ends in the bytes of one that was not cut."""

import pytest

from tests.matrix.cells import FAMILIES, TUNERS
from tests.train.test_resume import Outcome, outcomes_of


@pytest.fixture(scope="session")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    return outcomes_of("matrix", tmp_path_factory.mktemp("killed"))


@pytest.mark.column("resumes after kill -9")
def test_killed_it_ends_in_the_same_bytes(family: str, tuner: str, outcomes: dict[str, Outcome]):
    """The optimiser, dropout, running mean and noises differ from cell to cell; the cache is made anew."""
    whole, killed = outcomes[f"{family} {tuner}"], outcomes[f"{family} {tuner} killed"]
    assert whole.deaths == [0], whole.lives
    assert killed.deaths[-1] == 0, killed.lives
    assert whole.adapter
    assert killed.adapter == whole.adapter
    assert killed.record["steps"] == whole.record["steps"]
    assert killed.record["validations"] == whole.record["validations"]


def test_the_kills_came_in_time_to_prove_something(outcomes: dict[str, Outcome]):
    cut = [name for name, found in outcomes.items() if found.deaths == [9, 0]]
    assert len(cut) >= 0.9 * len(FAMILIES) * len(TUNERS)
