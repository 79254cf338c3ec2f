"""Adapter files: what goes in comes out, diffusers reads them, and what is not one is refused."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from livery.models.sd1 import SD1
from livery.nouns import AdapterCard, LiveryError, LowRankSpec
from livery.tuners.adapter_file import adapter_bytes, attach_adapter, read_adapter, read_card, write_adapter
from livery.tuners.lowrank import LowRank

Cards = Callable[..., AdapterCard]


@pytest.fixture
def tiny() -> SD1:
    return SD1.tiny()


def learnt(backbone: SD1, spec: LowRankSpec) -> dict[str, Tensor]:
    """Random values in every LoRA weight, as training would leave."""
    attached = LowRank.build(spec).attach(backbone)
    generator = torch.Generator().manual_seed(4)
    state = {n: 0.2 * torch.randn(t.shape, generator=generator) for n, t in attached.state().items()}
    attached.undo()
    return state


@pytest.fixture
def written(tiny: SD1, card_for: Cards, tmp_path: Path) -> Path:
    path = tmp_path / "adapter.safetensors"
    write_adapter(path, card_for(tiny.sha256), learnt(tiny, LowRankSpec(rank=4)))
    return path


def draw(pipe: Any) -> np.ndarray:
    generator = torch.Generator().manual_seed(0)
    return pipe("a cat", num_inference_steps=3, generator=generator, output_type="np").images


def test_what_is_written_is_read(tiny: SD1, card_for: Cards, tmp_path: Path):
    card, state = card_for(tiny.sha256), learnt(tiny, LowRankSpec(rank=4))
    path = tmp_path / "adapter.safetensors"
    adapter = write_adapter(path, card, state)
    again, tensors = read_adapter(path)
    assert adapter == again
    assert again.card == read_card(path) == card
    assert again.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert tensors.keys() == state.keys()
    assert all(torch.equal(tensors[name], state[name]) for name in state)
    assert [file.name for file in tmp_path.iterdir()] == ["adapter.safetensors"]


@pytest.mark.parametrize("spec", [LowRankSpec(rank=4), LowRankSpec(rank=3, alpha=7.5)])
def test_diffusers_loads_the_file_and_draws_the_same(
    spec: LowRankSpec, tiny: SD1, card_for: Cards, tmp_path: Path
):
    path = tmp_path / "pytorch_lora_weights.safetensors"
    write_adapter(path, card_for(tiny.sha256, spec=spec), learnt(tiny, spec))
    tiny.save(tmp_path / "base")
    stock = cast(Any, StableDiffusionPipeline.from_pretrained(tmp_path / "base", local_files_only=True))
    stock.set_progress_bar_config(disable=True)
    plain = draw(stock)
    stock.load_lora_weights(str(tmp_path), weight_name=path.name)
    attach_adapter(tiny, path)
    ours = draw(tiny.pipeline())
    assert np.array_equal(ours, draw(stock))
    assert np.abs(ours - plain).max() > 0.01
    stock.unload_lora_weights()
    stock.load_lora_weights(str(path))
    assert np.array_equal(ours, draw(stock))


def test_the_rank_and_alpha_stand_where_diffusers_reads_them(tiny: SD1, card_for: Cards, tmp_path: Path):
    spec = LowRankSpec(rank=3, alpha=7.5, targets=r"mid_block.*\.attn1\.to_q")
    path = tmp_path / "a.safetensors"
    write_adapter(path, card_for(tiny.sha256, spec=spec), learnt(tiny, spec))
    with safe_open(path, "pt") as file:
        told = json.loads(file.metadata()["lora_adapter_metadata"])
        names = set(file.keys())
    layer = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    assert told == {"unet.r": 3, "unet.lora_alpha": 7.5, "unet.target_modules": [layer]}
    assert names == {f"unet.{layer}.lora_A.weight", f"unet.{layer}.lora_B.weight"}


def test_attached_from_a_file_it_is_frozen_and_detaches(tiny: SD1, written: Path):
    before = draw(tiny.pipeline())
    attached = attach_adapter(tiny, written)
    assert not any(param.requires_grad for param in tiny.denoiser.parameters())
    assert not np.array_equal(draw(tiny.pipeline()), before)
    attached.undo()
    assert np.array_equal(draw(tiny.pipeline()), before)


def test_a_file_keeps_its_layers_when_the_defaults_change(tiny: SD1, written: Path):
    attached = attach_adapter(tiny, written)
    wanted = draw(tiny.pipeline())
    attached.undo()
    tiny.lora_targets = r".*\.to_q"
    attach_adapter(tiny, written)
    assert np.array_equal(draw(tiny.pipeline()), wanted)


def test_the_same_content_is_always_the_same_bytes(tiny: SD1, card_for: Cards):
    """The library's own writer orders metadata at random, anew in each call."""
    card, state = card_for(tiny.sha256), learnt(tiny, LowRankSpec(rank=4))
    orders = [state, dict(reversed(state.items()))] * 20
    assert len({adapter_bytes(card, each) for each in orders}) == 1


def test_a_failed_write_leaves_the_old_file(
    written: Path, tiny: SD1, card_for: Cards, monkeypatch: pytest.MonkeyPatch
):
    before = written.read_bytes()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_adapter(written, card_for(tiny.sha256), {})
    assert written.read_bytes() == before
    assert [file.name for file in written.parent.iterdir()] == [written.name]


def test_another_base_is_refused_unless_allowed(written: Path):
    other = SD1.tiny(seed=1)
    with pytest.raises(LiveryError, match=r"made for the base [0-9a-f]{12} \(tiny\), this one is"):
        attach_adapter(other, written)
    assert not hasattr(other.denoiser, "peft_config")
    attach_adapter(other, written, any_base=True).undo()


def test_another_family_is_refused_always(tiny: SD1, written: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(SD1, "family", "sdxl")
    with pytest.raises(LiveryError, match="made for a base of the family sd1, this one is sdxl"):
        attach_adapter(tiny, written, any_base=True)


def test_a_family_without_names_is_refused(tiny: SD1, card_for: Cards):
    with pytest.raises(LiveryError, match="'wan' have no file format yet"):
        adapter_bytes(card_for(tiny.sha256, family="wan"), {})


def rewritten(path: Path, metadata: dict[str, str]) -> None:
    save_file(load_file(path), path, metadata)


def with_a_strange_tensor(path: Path) -> None:
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file({**load_file(path), "vae.x": torch.zeros(1)}, path, metadata)


def of_another_rank(path: Path) -> None:
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file({name: torch.cat([t, t]) for name, t in load_file(path).items()}, path, metadata)


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda path: path.unlink(), "cannot be read (No such file"),
    "a zip pickle": (lambda path: torch.save({"a": torch.zeros(1)}, path), "a pickle, which can run code"),
    "a bare pickle": (lambda path: path.write_bytes(b"\x80\x02}q\x00."), "a pickle, which can run code"),
    "empty": (lambda path: path.write_bytes(b""), "not a safetensors file, or damaged"),
    "text": (lambda path: path.write_text("hello, this is no adapter"), "not a safetensors file, or damaged"),
    "cut": (lambda path: path.write_bytes(path.read_bytes()[:-100]), "damaged"),
    "cut in the header": (lambda path: path.write_bytes(path.read_bytes()[:100]), "damaged"),
    "no card": (lambda path: rewritten(path, {"format": "pt"}), "has no livery card, so it is a plain LoRA"),
    "no metadata": (lambda path: save_file(load_file(path), path), "has no livery card"),
    "a broken card": (lambda path: rewritten(path, {"livery": "{"}), "its livery card is not valid JSON"),
    "a foreign card": (lambda path: rewritten(path, {"livery": "{}"}), "recipe: Field required"),
    "a strange tensor": (with_a_strange_tensor, "tensor vae.x is of no part livery knows"),
    "another rank": (of_another_rank, "another rank"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_no_adapter_is_refused_with_one_sentence(name: str, tiny: SD1, written: Path):
    damage, told = BROKEN[name]
    damage(written)
    with pytest.raises(LiveryError) as refusal:
        attach_adapter(tiny, written)
    assert told in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert str(written) in str(refusal.value)
    assert not hasattr(tiny.denoiser, "peft_config")
