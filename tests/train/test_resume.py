"""A run that was killed with SIGKILL, at random moments, ends in the bytes of the run that was not."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

VICTIM = Path(__file__).with_name("resume_victim.py")


def outcome(folder: Path, kills: int, seed: int = 0) -> dict[str, Any]:
    command = [sys.executable, str(VICTIM), str(folder), str(kills), str(seed)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("unbroken")
    told = outcome(folder, kills=0)
    return (folder / "adapter.safetensors").read_bytes(), told["events"][0][-1]["run"]


@pytest.mark.parametrize("seed", [1, 2])
def test_killed_four_times_and_resumed_it_writes_the_same_adapter(
    seed: int, tmp_path: Path, unbroken: tuple[bytes, dict[str, Any]]
):
    content, record = unbroken
    told = outcome(tmp_path, kills=4, seed=seed)
    assert told["deaths"].count(9) >= 2, "the kills came too late to prove anything"
    assert told["deaths"][-1] == 0
    assert (tmp_path / "adapter.safetensors").read_bytes() == content
    again = told["events"][-1][-1]["run"]
    assert again["steps"] == record["steps"]
    assert again["validations"] == record["validations"]
    assert [step["step"] for step in again["steps"]] == list(range(1, 13))


def test_no_step_is_told_twice_beyond_the_last_checkpoint(
    tmp_path: Path, unbroken: tuple[bytes, dict[str, Any]]
):
    """What a life tells starts right behind a checkpoint, and equals what the unbroken run told there."""
    expected = {step["step"]: step for step in unbroken[1]["steps"]}
    told = outcome(tmp_path, kills=2, seed=3)
    for life in told["events"]:
        steps = [event for event in life if event["kind"] == "step"]
        assert [step["step"] for step in steps] == [*range(steps[0]["step"], steps[0]["step"] + len(steps))]
        assert steps[0]["step"] % 2 == 1
        assert all(step == {**expected[step["step"]], "kind": "step"} for step in steps)
