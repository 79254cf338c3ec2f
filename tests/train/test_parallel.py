"""Two processes with gloo train as one does: the same curve, the same adapter, files written once."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from livery.models.sd1 import SD1
from livery.nouns import Step, Trained
from livery.train.loop import train
from livery.train.parallel import ALONE, Peers
from livery.tuners.adapter_file import read_adapter
from tests.train.peers_victim import DATASET, RECIPE, paint


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    base = tmp_path_factory.mktemp("peers")
    return base / "one", base / "two"


@pytest.fixture(scope="module")
def one(folders: tuple[Path, Path]) -> Trained:
    *_, last = train(RECIPE, SD1.tiny(), DATASET, pixels=paint, folder=folders[0])
    assert isinstance(last, Trained)
    return last


@pytest.fixture(scope="module")
def two(folders: tuple[Path, Path]) -> list[dict[str, Any]]:
    starter = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    victim = Path(__file__).with_name("peers_victim.py")
    done = subprocess.run(
        [*starter, str(victim), str(folders[1])], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def test_two_processes_have_the_losses_of_one(one: Trained, two: list[dict[str, Any]]):
    """Batches of three rows: two here, one there. What differs is the order of sums."""
    losses = [event["loss"] for event in two if event["kind"] == "step"]
    assert losses == pytest.approx([step.loss for step in one.run.steps], rel=1e-6)
    looks = [event["loss"] for event in two if event["kind"] == "validation"]
    assert looks == pytest.approx([look.loss for look in one.run.validations], rel=1e-6)


def test_two_processes_end_with_the_adapter_of_one(
    one: Trained, two: list[dict[str, Any]], folders: tuple[Path, Path]
):
    alone, together = (read_adapter(folder / "adapter.safetensors") for folder in folders)
    assert together[0].sha256 == two[-1]["adapter"]["sha256"]
    assert alone[0].card == together[0].card
    # As a whole: where a gradient is next to nothing, AdamW makes much of its rounding.
    apart = sum(float((tensor - together[1][name]).square().sum()) for name, tensor in alone[1].items())
    size = sum(float(tensor.square().sum()) for tensor in alone[1].values())
    assert (apart / size) ** 0.5 <= 3e-5


def test_what_two_processes_saved_one_can_go_on_from(
    one: Trained, two: list[dict[str, Any]], folders: tuple[Path, Path]
):
    (folders[1] / "step-00000006.json").unlink()
    events = list(train(RECIPE, SD1.tiny(), DATASET, pixels=paint, folder=folders[1]))
    steps = [event for event in events if isinstance(event, Step)]
    assert [step.step for step in steps] == [4, 5, 6]
    assert [step.loss for step in steps] == pytest.approx([step.loss for step in one.run.steps[3:]], rel=1e-6)


def test_rows_are_shared_out_whole():
    rows = list(range(7))
    parts = [list(Peers(rank, 3).part(rows)) for rank in range(3)]
    assert parts == [[0, 1], [2, 3], [4, 5, 6]]
    turns = ["subject", "class"] * 4
    assert [list(Peers(rank, 2).part(turns)).count("class") for rank in range(2)] == [2, 2]
    assert ALONE.part(rows) == rows
    assert ALONE.leads
    assert ALONE.agree(True)
