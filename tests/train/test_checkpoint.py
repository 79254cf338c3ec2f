"""Checkpoints: what is written comes back, two are kept, a strange or damaged one is told apart."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from livery.nouns import LiveryError, Sample, Step, Validation
from livery.train import checkpoint

CPU = torch.device("cpu")
IDENTITY = checkpoint.Identity(recipe="a" * 64, dataset="b" * 64, base="c" * 64)


def journal(steps: int) -> checkpoint.Journal:
    return checkpoint.Journal(
        identity=IDENTITY,
        steps=tuple(Step(step=i + 1, loss=1 / (i + 3), learning_rate=0.1) for i in range(steps)),
        validations=(Validation(step=0, loss=0.1 + 0.2),),
        samples=(Sample(step=0, prompt="é", sha256="d" * 64),),
        seconds=1.5,
        peak_memory_bytes=10,
    )


def test_journal_and_tensors_come_back_bit_for_bit(tmp_path: Path):
    tensors = {"x": torch.randn(4), "s": torch.tensor(3.0), "e": torch.tensor(0.1).bfloat16()}
    checkpoint.write(tmp_path, journal(5), tensors)
    found = checkpoint.latest(tmp_path, IDENTITY, CPU)
    assert found
    assert found.journal == journal(5)
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in tensors.items())


WRITE = """
import resource, sys, torch
from pathlib import Path
from livery.train.checkpoint import write_tensors
state = {str(i): torch.ones(1 << 22) for i in range(8)}  # 8 x 16 MiB
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
write_tensors(Path(sys.argv[1]), state)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_writing_takes_no_second_copy_of_the_state(tmp_path: Path):
    path = tmp_path / "state.safetensors"
    done = subprocess.run(
        [sys.executable, "-c", WRITE, str(path)], capture_output=True, text=True, check=True
    )
    unit = 1 if sys.platform == "darwin" else 1024
    assert int(done.stdout) * unit < 32 << 20
    assert path.stat().st_size > 128 << 20


def test_a_written_files_hash_is_told(tmp_path: Path):
    told = checkpoint.write_tensors(tmp_path / "x.safetensors", {"x": torch.ones(3), "s": torch.tensor(2)})
    assert told == checkpoint.sha256_of_file(tmp_path / "x.safetensors")


def test_only_the_last_two_are_kept_and_the_last_is_read(tmp_path: Path):
    for steps in (1, 2, 12):
        checkpoint.write(tmp_path, journal(steps), {"x": torch.full((1,), float(steps))})
    assert checkpoint.steps(tmp_path) == [2, 12]
    assert len(list(tmp_path.iterdir())) == 4
    found = checkpoint.latest(tmp_path, IDENTITY, CPU)
    assert found
    assert found.tensors["x"].item() == 12


def _torn(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def _flipped(path: Path, place: float = 0.99) -> None:
    content = bytearray(path.read_bytes())
    content[int(len(content) * place)] ^= 1
    path.write_bytes(bytes(content))


HARMS: dict[str, Callable[[Path], object]] = {
    "torn": _torn,
    "a bit of a tensor": _flipped,
    "a bit of the journal": lambda path: _flipped(path, 0.3),
    "gone": Path.unlink,
    "empty": lambda path: path.write_bytes(b""),
    "torn manifest": lambda path: _torn(path.with_suffix(".json")),
    "a bit of the manifest": lambda path: _flipped(path.with_suffix(".json"), 0.6),
    "no manifest": lambda path: path.with_suffix(".json").unlink(),
    "another manifest": lambda path: path.with_suffix(".json").write_text('["x"]'),
    "what it needs": lambda path: _flipped(path.with_name("best.safetensors"), 0.5),
}


@pytest.mark.parametrize("harm", HARMS)
def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path: Path, harm: str):
    checkpoint.write(tmp_path, journal(1), {"x": torch.zeros(8)})
    needed = tmp_path / "best.safetensors"
    needed.write_bytes(b"an adapter")
    checkpoint.write(tmp_path, journal(2), {"x": torch.ones(8)}, [needed])
    HARMS[harm](tmp_path / "step-00000002.safetensors")
    found = checkpoint.latest(tmp_path, IDENTITY, CPU)
    assert found
    assert len(found.journal.steps) == 1
    assert torch.equal(found.tensors["x"], torch.zeros(8))


def test_every_bit_of_a_checkpoint_is_watched(tmp_path: Path):
    """Flip one bit at 60 places of the file, one after the other: none is read as if it were whole."""
    checkpoint.write(tmp_path, journal(1), {"x": torch.zeros(8)})
    path = tmp_path / "step-00000001.safetensors"
    whole = path.read_bytes()
    for place in range(0, len(whole), max(1, len(whole) // 60)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        assert checkpoint.latest(tmp_path, IDENTITY, CPU) is None
    path.write_bytes(whole)
    assert checkpoint.latest(tmp_path, IDENTITY, CPU)


def test_later_checkpoints_can_be_forgotten_or_all(tmp_path: Path):
    for steps in (3, 7):
        checkpoint.write(tmp_path, journal(steps), {})
    checkpoint.forget_after(tmp_path, 3)
    assert checkpoint.steps(tmp_path) == [3]
    checkpoint.clear(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("part", checkpoint.Identity.model_fields)
def test_a_checkpoint_of_another_run_is_refused_in_one_sentence(tmp_path: Path, part: str):
    checkpoint.write(tmp_path, journal(1), {})
    other = IDENTITY.model_copy(update={part: "e" * 64})
    with pytest.raises(LiveryError, match=f"another {part}; train in another folder") as caught:
        checkpoint.latest(tmp_path, other, CPU)
    assert str(tmp_path) in str(caught.value)


def test_no_checkpoint_is_none_clear_forgets_and_sweep_removes_what_a_kill_left(tmp_path: Path):
    assert checkpoint.latest(tmp_path / "nowhere", IDENTITY, CPU) is None
    checkpoint.write(tmp_path, journal(1), {})
    (tmp_path / ".step-00000002.safetensors.ab12cd34").write_bytes(b"half")
    checkpoint.sweep(tmp_path)
    assert not list(tmp_path.glob(".*"))
    assert checkpoint.steps(tmp_path) == [1]
    checkpoint.clear(tmp_path)
    assert not list(tmp_path.iterdir())
