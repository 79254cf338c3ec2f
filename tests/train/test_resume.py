"""A run that was killed with SIGKILL, at random moments, ends in the bytes of the run that was not.

One long training killed again and again, and a short one for every family and tuner, killed once and with
its cache deleted before it goes on.
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


@pytest.fixture(scope="module")
def all_outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    folder = tmp_path_factory.mktemp("runs")
    command = [sys.executable, str(VICTIM), str(folder), ",".join(map(str, KILLS))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr
    return {
        told["name"]: Outcome(_adapter(folder / told["name"]), told["deaths"], told["events"])
        for told in json.loads(done.stdout)
    }


def _adapter(folder: Path) -> bytes:
    path = folder / "adapter.safetensors"
    return path.read_bytes() if path.is_file() else b""


@pytest.fixture
def outcomes(all_outcomes: dict[str, Outcome]) -> list[Outcome]:
    """One unbroken run, then killed ones."""
    return [all_outcomes[str(number)] for number in range(len(KILLS))]


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


def test_every_family_with_every_tuner_resumes_bit_for_bit(all_outcomes: dict[str, Outcome]):
    """Over four optimisers, with and without a running mean, dropout, and a cache that is made anew."""
    cells = [name for name in all_outcomes if " " in name and not name.endswith(" killed")]
    assert len(cells) >= 33
    cut, failed = 0, []
    for name in cells:
        whole, killed = all_outcomes[name], all_outcomes[f"{name} killed"]
        assert whole.deaths == [0], f"{name}: {whole.lives}"
        cut += killed.deaths == [9, 0]
        same = killed.adapter == whole.adapter and killed.record["steps"] == whole.record["steps"]
        if not (whole.adapter and same and killed.record["validations"] == whole.record["validations"]):
            failed.append(name)
    assert not failed
    assert cut >= 0.9 * len(cells)
