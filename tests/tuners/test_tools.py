"""Merge, extract and resize: against sums, differences and singular values worked out apart."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from livery import plugins
from livery.models.backbone import Backbone
from livery.models.load import load_backbone
from livery.models.sd1 import SD1
from livery.nouns import AdapterCard, Checked, FullSpec, LiveryError, LowRankSpec, TokensSpec
from livery.tuners.adapter_file import attach_state
from livery.tuners.delta import base_weights, deltas, layers
from livery.tuners.export import Style, export_adapter
from livery.tuners.making import Held, extract_adapter, merge_adapters, resize_adapter
from livery.tuners.merging import merged, write_merged
from livery.tuners.rank import EXACT_SIDE, lower, reduced
from livery.tuners.tools import merge

Learn = Callable[..., dict[str, Tensor]]
Cards = Callable[..., AdapterCard]
LAYERS = r"mid_block\.(attentions\.0\.(proj_in|transformer_blocks\.0\.attn1\.to_[qk])|resnets\.0\.conv1)"
LORA = LowRankSpec(rank=3, alpha=5, targets=LAYERS, towers={"text_encoder": 1e-4})
OTHER = LowRankSpec(rank=2, rslora=True, targets=LAYERS)
DORA = LowRankSpec(rank=2, dora=True, targets=LAYERS)
LOHA = LowRankSpec(kind="loha", rank=2, targets=LAYERS)


@pytest.fixture
def base() -> SD1:
    return SD1.tiny()


@pytest.fixture
def held(base: SD1, card_of: Cards, learnt_by: Learn) -> Callable[..., Held]:
    def make(*specs: LowRankSpec, seed: int = 4) -> Held:
        return Held(f"adapter{seed}", card_of(base, *specs), learnt_by(base, *specs, seed=seed))

    return make


def changes(held: Held, base: SD1) -> dict[str, Tensor]:
    return dict(deltas(held.layers, base_weights(base)))


def as_held(card: AdapterCard, state: dict[str, Tensor]) -> Held:
    return Held("made", card, state)


def test_a_merge_is_the_weighted_sum_exactly(base: SD1, held: Callable[..., Held]):
    one, two = held(LORA), held(OTHER, seed=5)
    card, state, report = merge_adapters([(one, 0.7), (two, -0.3)], base, "tiny")
    assert report is None
    got, first, second = changes(as_held(card, state), base), changes(one, base), changes(two, base)
    assert got.keys() == first.keys() | second.keys()
    for name, change in got.items():
        wanted = 0.7 * first[name] - 0.3 * second.get(name, torch.zeros(()))
        assert torch.allclose(change, wanted, atol=1e-6)
    ranks = {name: tensor.shape[0] for name, tensor in state.items() if "lora_A" in name}
    assert set(ranks.values()) == {3 + 2, 3}
    assert card.origin == "merged from 0.7 x adapter4 and -0.3 x adapter5"
    assert card.dataset == "0" * 64
    assert card.trigger_words == ("acme style",)
    attach_state(base, card, state).undo()


def test_a_merge_of_other_kinds_has_the_rank_that_is_given(base: SD1, held: Callable[..., Held]):
    one, two = held(LOHA), held(DORA, seed=5)
    with pytest.raises(LiveryError, match="sums have no rank of their own: give a rank"):
        merge_adapters([(one, 1), (two, 1)], base, "tiny")
    card, state, report = merge_adapters([(one, 1), (two, 1)], base, "tiny", rank=32)
    assert report is not None
    got, first, second = changes(as_held(card, state), base), changes(one, base), changes(two, base)
    squares = [
        ((first[n] + second[n]).square().sum(), (first[n] + second[n] - got[n]).square().sum()) for n in got
    ]
    lost = float(sum(miss for _, miss in squares) / sum(size for size, _ in squares))
    assert 1 - report.kept == pytest.approx(lost, abs=1e-4)
    assert 0 < lost < 0.5


def test_a_resize_keeps_the_largest_singular_values(base: SD1, held: Callable[..., Held]):
    one = held(LORA)
    card, state, report = resize_adapter(one, base, "tiny", 2)
    assert report is not None
    before, after = changes(one, base), changes(as_held(card, state), base)
    sizes, kept = 0.0, 0.0
    for name, change in before.items():
        u, s, vh = np.linalg.svd(change.flatten(1).double().numpy(), full_matrices=False)
        nearest = torch.from_numpy((u[:, :2] * s[:2]) @ vh[:2]).float().reshape(change.shape)
        assert torch.allclose(after[name], nearest, atol=1e-5)
        share = report.layers[name.removesuffix(".weight")]
        assert share == pytest.approx(float((s[:2] ** 2).sum() / (s**2).sum()), abs=1e-5)
        sizes, kept = sizes + float((s**2).sum()), kept + float((s[:2] ** 2).sum())
    assert report.kept == pytest.approx(kept / sizes, abs=1e-5)
    assert card.origin == "resized from adapter4 to rank 2"
    assert {t.shape[0] for name, t in state.items() if "lora_A" in name} == {2}


def test_a_higher_rank_changes_nothing(base: SD1, held: Callable[..., Held]):
    one = held(LORA)
    found, report = reduced(one.layers, 8)
    assert report.kept == 1
    before, after = changes(one, base), dict(deltas(found))
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_large_matrices_are_cut_by_projection_nearly_as_well():
    side = EXACT_SIDE + 1
    generator = torch.Generator().manual_seed(0)
    strong = torch.randn(side, 4, generator=generator) @ torch.randn(4, side, generator=generator)
    change = strong + 0.01 * torch.randn(side, side, generator=generator)
    cut = lower(change, 4)
    down, up = (cut.layer.leaves[f"lora_{side}.weight"] for side in "AB")
    missed = float((change - up @ down).square().sum())
    assert missed == pytest.approx(cut.size - cut.kept, rel=1e-2)
    assert missed < 1.02 * float((0.01**2) * side * side)


@pytest.mark.parametrize("family", list(plugins.families()))
def test_what_was_merged_in_is_extracted_again(family: str, card_of: Cards, learnt_by: Learn, tmp_path: Path):
    base: Backbone = plugins.families()[family].tiny()
    spec = LowRankSpec(rank=2, alpha=3, towers=dict.fromkeys(base.towers, 1e-4))
    state, card = learnt_by(base, spec), card_of(base, spec)
    wanted = dict(deltas(layers((spec,), state)))
    before = {name: tensor.clone() for name, tensor in base_weights(base).items()}
    events = list(export_adapter(tmp_path / "folder", card, state, base, "folder"))
    assert all(torch.equal(tensor, before[name]) for name, tensor in base_weights(base).items())
    checked = next(event for event in events if isinstance(event, Checked))
    assert checked.difference < 1e-6 < 1e-2 < checked.largest
    tuned = load_backbone(tmp_path / "folder")
    made, found, report = extract_adapter(tuned, "tuned", base, "tiny", 2)
    assert report is not None
    assert report.kept > 0.99999
    got = dict(deltas(layers(made.recipe.tuners, found)))
    assert got.keys() == wanted.keys()
    assert all(torch.allclose(got[name], wanted[name], atol=1e-5) for name in wanted)
    assert made.origin == "extracted from tuned over tiny at rank 2"


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_a_merged_checkpoint_draws_as_the_attached_adapter(
    dtype: str, base: SD1, held: Callable[..., Held], tmp_path: Path
):
    one = held(LOHA)
    path = tmp_path / "model.safetensors"
    events = list(write_merged(path, base, [(one.layers, 1.0)], dtype))
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]
    assert next(event for event in events if isinstance(event, Checked)).format == "checkpoint"
    merged_model = load_backbone(path)
    noisy = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    attached = attach_state(base, one.card, one.state)
    with torch.no_grad():
        wanted = base.predict(noisy, torch.tensor([500]), base.encode_prompts(["a fox"]))
        attached.undo()
        plain = base.predict(noisy, torch.tensor([500]), base.encode_prompts(["a fox"]))
        got = merged_model.predict(noisy, torch.tensor([500]), merged_model.encode_prompts(["a fox"]))
    assert torch.allclose(got, wanted, atol=1e-5 if dtype == "fp32" else 5e-3)
    assert not torch.allclose(plain, wanted, atol=1e-2)


def test_several_merge_relative_to_the_plain_base(base: SD1, held: Callable[..., Held]):
    one, two = held(DORA), held(LORA, seed=5)
    weights = base_weights(base)
    before = {name: tensor.clone() for name, tensor in weights.items()}
    first, second = changes(one, base), changes(two, base)
    with merged(base, [(one.layers, 0.5), (two.layers, 2.0)]) as changed:
        assert changed == first.keys() | second.keys()
        for name in changed:
            wanted = before[name] + 0.5 * first.get(name, torch.zeros(())) + 2 * second[name]
            assert torch.allclose(weights[name], wanted, atol=1e-6)
    assert all(torch.equal(weights[name], tensor) for name, tensor in before.items())


def test_what_a_lora_cannot_hold_counts_as_lost(base: SD1, card_of: Cards, learnt_by: Learn, tmp_path: Path):
    spec = FullSpec(targets=r"conv_in\..*")
    state, card = learnt_by(base, spec), card_of(base, spec)
    found, report = reduced(layers((spec,), state), 100, base_weights(base))
    assert list(found) == ["denoiser.conv_in"]
    assert report.left_out == ("denoiser.conv_in.bias",)
    weight, bias = (state[f"denoiser.conv_in.{leaf}"] for leaf in ("weight", "bias"))
    old = base_weights(base)
    sizes = [
        float((weight - old["denoiser.conv_in.weight"]).square().sum()),
        float((bias - old["denoiser.conv_in.bias"]).square().sum()),
    ]
    assert report.kept == pytest.approx(sizes[0] / sum(sizes), abs=1e-6)
    list(export_adapter(tmp_path / "a.safetensors", card, state, base, "kohya", Style(rank=100)))


def test_what_does_not_go_together_is_refused(
    base: SD1, held: Callable[..., Held], card_of: Cards, learnt_by: Learn, tmp_path: Path
):
    one, other = held(LORA), SD1.tiny(seed=1)
    with pytest.raises(LiveryError, match="adapters of one base go together"):
        merge_adapters([(one, 1)], other, "tiny")
    with pytest.raises(LiveryError, match="the same weights in every layer"):
        extract_adapter(base, "x", base, "tiny", 2)
    words = TokensSpec(tokens={"<a>": "shoe"})
    taught = Held("words", card_of(base, words), learnt_by(base, words))
    with pytest.raises(LiveryError, match="teach the word <a>"):
        merge_adapters([(taught, 1), (taught, 1)], base, "tiny")
    with pytest.raises(LiveryError, match="teaches words only, which have no rank"):
        resize_adapter(taught, base, "tiny", 2)
    with pytest.raises(LiveryError, match="no layer above rank 64: give a lower one"):
        resize_adapter(one, base, "tiny", 64)
    (tmp_path / "taken.safetensors").write_bytes(b"mine")
    with pytest.raises(LiveryError, match="is there already"):
        list(write_merged(tmp_path / "taken.safetensors", base, [(one.layers, 1)]))
    full = FullSpec(targets=r"conv_in\..*")
    whole = layers((full,), learnt_by(base, full))
    with pytest.raises(LiveryError, match="trained whole"):
        merge([(whole, 1)], rank=2, weights=base_weights(base))
