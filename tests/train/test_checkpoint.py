"""Checkpoints: what is written comes back, two are kept, a strange or damaged one is told apart."""

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


def test_only_the_last_two_are_kept_and_the_last_is_read(tmp_path: Path):
    for steps in (1, 2, 12):
        checkpoint.write(tmp_path, journal(steps), {"x": torch.full((1,), float(steps))})
    assert len(list(tmp_path.iterdir())) == 2
    found = checkpoint.latest(tmp_path, IDENTITY, CPU)
    assert found
    assert found.tensors["x"].item() == 12


def test_a_damaged_file_gives_way_to_the_one_before(tmp_path: Path):
    checkpoint.write(tmp_path, journal(1), {"x": torch.zeros(8)})
    checkpoint.write(tmp_path, journal(2), {"x": torch.ones(8)})
    last = max(tmp_path.iterdir())
    last.write_bytes(last.read_bytes()[:-5])
    found = checkpoint.latest(tmp_path, IDENTITY, CPU)
    assert found
    assert len(found.journal.steps) == 1


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
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001.safetensors"]
    checkpoint.clear(tmp_path)
    assert not list(tmp_path.iterdir())
