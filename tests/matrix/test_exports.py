"""Each training leaves as files of other tools, and comes back as the same change."""

from pathlib import Path

import pytest
import torch

from livery.nouns import Checked, FullSpec, LowRankSpec, TokensSpec, TunerSpec, Written
from livery.tuners.adapter_file import attach_state
from livery.tuners.export import Style, export_adapter
from livery.tuners.importing import import_adapter
from tests.matrix.cells import SPOKEN, WORD, Base, Story, answer, card


def form(spec: TunerSpec, family: str) -> tuple[str, int | None]:
    """The format for a tuner, and a rank where the format holds no more than a plain LoRA of it."""
    if isinstance(spec, FullSpec):
        return "checkpoint", None
    if isinstance(spec, TokensSpec):
        return "embedding", None
    assert isinstance(spec, LowRankSpec)
    fits = spec.kind in ("lora", "loha") or (spec.kind == "lokr" and family != "sd3")
    return "kohya", None if fits else 2


@pytest.mark.column("exports and comes back")
def test_what_is_exported_means_the_same(family: str, tuner: str, base: Base, story: Story, tmp_path: Path):
    """Every export reads its file back and compares the change; what holds it whole is imported too."""
    backbone, mine = base.backbone, card(base.backbone, story.specs)
    whole: list[str] = []
    for spec in story.specs:
        name, rank = form(spec, family)
        path = tmp_path / f"{name}.safetensors"
        events = list(export_adapter(path, mine, story.last, backbone, name, Style(rank=rank)))
        [checked] = [event for event in events if isinstance(event, Checked)]
        written = events[-1]
        assert isinstance(written, Written)
        assert checked.unmatched == ()
        assert checked.matched > 0
        assert checked.difference <= 1e-6 < checked.largest
        if len(story.specs) == 1 and rank is None and name != "checkpoint":
            whole.append(written.path)
    for path in whole:
        back, state, _ = import_adapter(Path(path), backbone, base="tiny", word=WORD)
        attached = attach_state(backbone, back, state)
        again = answer(backbone, SPOKEN)
        attached.undo()
        assert torch.allclose(again, story.tuned, atol=1e-5)
