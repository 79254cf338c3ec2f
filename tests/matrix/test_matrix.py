"""Every family x every tuner keeps every promise.

On tiny models with random weights: shows that the parts fit and that learning goes down, not that it is good.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save

from livery import plugins
from livery.models.sd1 import SD1
from livery.tuners.adapter_file import attach_adapter, write_adapter
from livery.tuners.tuner import attach_all, build
from tests.matrix.cells import FAMILIES, SPOKEN, STEPS, TUNERS, Base, Story, answer, card, learn, optimizer_of
from tests.matrix.table import Table


def test_the_table_has_every_family_and_kind():
    kinds = {spec.kind for specs in TUNERS.values() for spec in specs(SD1.tiny())}
    assert kinds == set(plugins.tuners())
    assert set(FAMILIES) == set(plugins.families())
    assert {"sd1", "sdxl", "sd3"} <= set(FAMILIES)


def test_an_empty_cell_is_seen():
    table = Table([("sd1", "lora"), ("sd1", "full")], ["learns", "draws"])
    table.record("sd1", "lora", "learns", "passed")
    table.record("sd1", "lora", "learns", "failed")
    table.record("sd1", "full", "draws", "skipped", "has no file")
    assert table.empty() == [("sd1", "lora", "draws"), ("sd1", "full", "learns")]
    lines = list(table.lines())
    assert lines[3].split() == ["sd1", "lora", "NO", "....."]
    assert lines[4].split() == ["sd1", "full", ".....", "-"]
    assert lines[5].strip() == "-  draws: has no file"


@pytest.mark.column("attaching changes nothing")
def test_attaching_changes_nothing(family: str, tuner: str, base: Base, story: Story):
    assert torch.equal(story.started, base.plain)


@pytest.mark.column("learns")
def test_learns(family: str, tuner: str, base: Base, story: Story):
    """The loss falls, the output moves, and so does nearly all that learns.

    Not all: SDXL reads the last but one layer of its first text encoder, so its last layer has no gradient.
    """
    assert len(story.losses) == STEPS
    assert story.losses[-1] < 0.999 * story.losses[0]
    assert not torch.allclose(story.tuned, story.untuned, atol=1e-4)
    still = [name for name, tensor in story.last.items() if torch.equal(tensor, story.first[name])]
    assert len(still) < 0.2 * len(story.last), still


@pytest.mark.column("strength 0 is the base")
def test_strength_0_is_the_base(family: str, tuner: str, base: Base, story: Story):
    assert torch.equal(story.at_zero, base.plain)
    assert torch.equal(story.at_one, story.tuned)


@pytest.mark.column("detaches bit for bit")
def test_detaches_bit_for_bit(family: str, tuner: str, base: Base, story: Story):
    assert story.left_untouched


@pytest.mark.column("saves and reloads")
def test_saves_and_reloads_to_the_same_output(
    family: str, tuner: str, base: Base, story: Story, tmp_path: Path
):
    path = tmp_path / "adapter.safetensors"
    write_adapter(path, card(base.backbone, story.specs), story.last)
    attached = attach_adapter(base.backbone, path)
    again = answer(base.backbone, SPOKEN)
    state = attached.state()
    attached.undo()
    assert torch.equal(again, story.tuned)
    assert state.keys() == story.last.keys()
    assert all(torch.equal(tensor, story.last[name]) for name, tensor in state.items())


@pytest.mark.column("resumes bit for bit")
def test_resumes_to_the_same_bits(family: str, tuner: str, base: Base, story: Story):
    """State and optimiser as they were half-way, through a file's bytes, go on as if nothing had happened."""
    attached = attach_all([build(spec) for spec in story.specs], base.backbone, seed=99)
    attached.load(load(save(story.half)))
    optimizer = optimizer_of(attached)
    optimizer.load_state_dict(story.half_optimizer)
    losses = learn(base, attached, optimizer, STEPS // 2, STEPS)
    state = attached.state()
    attached.undo()
    assert losses == story.losses[STEPS // 2 :]
    assert all(torch.equal(tensor, story.last[name]) for name, tensor in state.items())
