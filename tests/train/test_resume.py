"""A run that was killed with SIGKILL, at random moments, ends in the bytes of the run that was not."""

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


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[Outcome]:
    """One unbroken run, then killed ones."""
    folder = tmp_path_factory.mktemp("runs")
    command = [sys.executable, str(VICTIM), str(folder), *map(str, KILLS)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    files = [(folder / str(n) / "adapter.safetensors").read_bytes() for n in range(len(KILLS))]
    return [Outcome(file, one["deaths"], one["events"]) for file, one in zip(files, told, strict=True)]


def test_the_kills_came_in_time_to_prove_something(outcomes: list[Outcome]):
    assert len(outcomes) == len(KILLS)
    assert outcomes[0].deaths == [0]
    for killed in outcomes[1:]:
        assert killed.deaths.count(9) >= 2
        assert killed.deaths[-1] == 0


def test_killed_and_resumed_it_writes_the_same_adapter(outcomes: list[Outcome]):
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
