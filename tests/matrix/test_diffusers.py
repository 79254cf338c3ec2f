"""Diffusers alone, from our base folder and our adapter file, draws the pictures that we draw."""

from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline

from livery.nouns import LowRankSpec
from livery.tuners.adapter_file import attach_adapter, write_adapter
from tests.matrix.cells import Base, Story, card

LOADED = ("denoiser", "text_encoder", "text_encoder_2")
"""Diffusers has no loader for a LoRA of a third text encoder."""


@pytest.fixture(scope="session")
def folders() -> dict[str, Path]:
    return {}


def draw(pipe: DiffusionPipeline) -> np.ndarray:
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return cast(Any, pipe)("a fox", num_inference_steps=2, generator=generator, output_type="np").images


@pytest.mark.column("diffusers draws the same")
def test_diffusers_draws_the_same_pictures(
    family: str, tuner: str, base: Base, story: Story, tmp_path: Path, folders: dict[str, Path]
):
    if not all(isinstance(spec, LowRankSpec) and spec.kind == "lora" for spec in story.specs):
        pytest.skip("diffusers loads LoRA files, and no other kind, into its models by itself")
    if family not in folders:
        folders[family] = tmp_path / "base"
        base.backbone.save(folders[family])
    path = tmp_path / "adapter.safetensors"
    state = {name: tensor for name, tensor in story.last.items() if name.split(".")[0] in LOADED}
    write_adapter(path, card(base.backbone, story.specs), state)
    stock = DiffusionPipeline.from_pretrained(folders[family], local_files_only=True)
    plain = draw(stock)
    cast(Any, stock).load_lora_weights(str(path))
    theirs = draw(stock)
    attached = attach_adapter(base.backbone, path)
    ours = draw(base.backbone.pipeline())
    attached.undo()
    # Not bit for bit: weights that diffusers maps from a file lie otherwise in memory than ours.
    assert np.abs(theirs - ours).max() < 1e-5
    assert np.abs(plain - ours).max() > 1e-3
