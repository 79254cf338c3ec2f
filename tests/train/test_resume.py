"""A run that was killed with SIGKILL, at random moments, ends in the bytes of the run that was not.

One long training, killed again and again; `tests/matrix/test_kills.py` kills a short one of every family and
tuner.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest

VICTIM = Path(__file__).with_name("resume_victim.py")
KILLS = (0, 3, 3)


class Outcome(NamedTuple):
    """The adapter file's bytes, what each life died of, and the events it told."""

    adapter: bytes
    deaths: list[int]
    lives: list[list[dict[str, Any]]]

    @property
    def record(self) -> dict[str, Any]:
        """The Run that the last life told."""
        return self.lives[-1][-1]["run"]


def outcomes_of(what: str, folder: Path) -> dict[str, Outcome]:
    """What the victims' process made of it; by name."""
    command = [sys.executable, str(VICTIM), str(folder), what]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr
    return {
        told["name"]: Outcome(_adapter(folder / told["name"]), told["deaths"], told["events"])
        for told in json.loads(done.stdout)
    }


def _adapter(folder: Path) -> bytes:
    path = folder / "adapter.safetensors"
    return path.read_bytes() if path.is_file() else b""


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[Outcome]:
    """One unbroken run, then killed ones."""
    found = outcomes_of(",".join(map(str, KILLS)), tmp_path_factory.mktemp("runs"))
    return [found[str(number)] for number in range(len(KILLS))]


def test_the_kills_came_in_time_to_prove_something(outcomes: list[Outcome]):
    assert len(outcomes) == len(KILLS)
    assert outcomes[0].deaths == [0]
    for killed in outcomes[1:]:
        assert killed.deaths.count(9) >= 2
        assert killed.deaths[-1] == 0


def test_killed_and_resumed_it_writes_the_same_adapter(outcomes: list[Outcome]):
    assert outcomes[0].adapter
    assert [killed.adapter == outcomes[0].adapter for killed in outcomes[1:]] == [True] * 2


def test_killed_and_resumed_its_curves_are_whole_and_the_same(outcomes: list[Outcome]):
    assert [step["step"] for step in outcomes[0].record["steps"]] == list(range(1, 21))
    assert [look["step"] for look in outcomes[0].record["validations"]] == [0, 5, 10, 15, 20]
    for killed in outcomes[1:]:
        assert killed.record["steps"] == outcomes[0].record["steps"]
        assert killed.record["validations"] == outcomes[0].record["validations"]


def test_each_life_starts_right_behind_a_checkpoint(outcomes: list[Outcome]):
    """Checkpoints are due every second step; each step equals what the unbroken run told there."""
    expected = {step["step"]: step for step in outcomes[0].record["steps"]}
    for life in (life for killed in outcomes[1:] for life in killed.lives):
        steps = [event for event in life if event["kind"] == "step"]
        first = steps[0]["step"] if steps else 1
        assert first % 2 == 1
        assert [step["step"] for step in steps] == [*range(first, first + len(steps))]
        assert steps == [expected[step["step"]] for step in steps]
