"""What other tools' files say, in all their forms; words; and what is refused."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from livery import plugins
from livery.models.backbone import Backbone
from livery.models.weights_file import CONVERT
from livery.nouns import AdapterCard, Checked, LiveryError, LowRankSpec, Note, TokensSpec, Written
from livery.tuners.adapter_file import attach_state
from livery.tuners.delta import base_weights, deltas, layers
from livery.tuners.export import Style, export_adapter
from livery.tuners.formats.names import kohya_places
from livery.tuners.importing import import_adapter, read_file, word_widths

Learn = Callable[..., dict[str, Tensor]]
Cards = Callable[..., AdapterCard]
FAMILIES = list(plugins.families())


@cache
def tiny(family: str) -> Backbone:
    return plugins.families()[family].tiny()


# ------------------------------------------------------------------ alphas


def plain_kohya(base: Backbone, learnt_by: Learn) -> dict[str, Tensor]:
    """A LoRA of scale 1 as kohya writes it, without alphas."""
    spec = LowRankSpec(rank=3)
    renamed = {"lora_A": "lora_down", "lora_B": "lora_up"}
    tensors: dict[str, Tensor] = {}
    for name, tensor in learnt_by(base, spec).items():
        module, _, leaf = name.removeprefix("denoiser.").rpartition(".lora_")
        side = renamed[f"lora_{leaf[0]}"]
        tensors[f"lora_unet_{module.replace('.', '_')}.{side}.weight"] = tensor
    return tensors


@pytest.mark.parametrize(("alpha", "scale"), [(None, 1.0), (0.0, 1.0), (6.0, 2.0), (1.0, 1 / 3)])
def test_alpha_is_read_as_kohya_means_it(alpha: float | None, scale: float, learnt_by: Learn, tmp_path: Path):
    base = tiny("sd1")
    tensors = plain_kohya(base, learnt_by)
    if alpha is not None:
        names = {name.split(".")[0] for name in tensors}
        tensors |= {f"{name}.alpha": torch.tensor(alpha) for name in names}
    save_file(tensors, tmp_path / "a.safetensors")
    found = read_file(tmp_path / "a.safetensors", base).layers
    assert {round(layer.scale, 9) for layer in found.values()} == {round(scale, 9)}
    assert len(found) == len(tensors) // (2 if alpha is None else 3)


def test_rslora_is_told_as_the_alpha_that_others_divide_by_the_rank(
    card_of: Cards, learnt_by: Learn, tmp_path: Path
):
    base, spec = tiny("sd1"), LowRankSpec(rank=4, alpha=3, rslora=True)
    path = tmp_path / "a.safetensors"
    list(export_adapter(path, card_of(base, spec), learnt_by(base, spec), base, "kohya"))
    assert {float(t) for name, t in load_file(path).items() if name.endswith("alpha")} == {3 * 4**0.5}


def test_folded_alpha_is_right_for_readers_that_look_at_no_header(
    card_of: Cards, learnt_by: Learn, tmp_path: Path
):
    base, spec = tiny("sd1"), LowRankSpec(rank=3, alpha=5)
    state = learnt_by(base, spec)
    path = tmp_path / "a.safetensors"
    list(export_adapter(path, card_of(base, spec), state, base, "diffusers", Style(fold_alpha=True)))
    tensors = load_file(path)
    name = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    ours = f"denoiser.{name.removeprefix('unet.')}"
    up, down = tensors[f"{name}.lora_B.weight"], tensors[f"{name}.lora_A.weight"]
    wanted = 5 / 3 * state[f"{ours}.lora_B.weight"] @ state[f"{ours}.lora_A.weight"]
    assert torch.allclose(up @ down, wanted, atol=1e-6)
    with safe_open(path, "pt") as file:
        told = json.loads(file.metadata()["lora_adapter_metadata"])
    assert told["unet.r"] == told["unet.lora_alpha"] == 3


# ------------------------------------------------------------------ other forms of the same


@pytest.mark.skipif("sd3" not in FAMILIES, reason="no SD3 here")
def test_sd3_queries_keys_and_values_are_one_layer_whose_rows_are_theirs(
    card_of: Cards, learnt_by: Learn, tmp_path: Path
):
    """Read as ComfyUI does: alpha / rank * up @ down on the fused weight."""
    base, spec = tiny("sd3"), LowRankSpec(rank=4, ranks={r".*to_q": 2}, alphas={r".*to_v": 1.5})
    state = learnt_by(base, spec)
    path = tmp_path / "a.safetensors"
    list(export_adapter(path, card_of(base, spec), state, base, "kohya"))
    tensors = load_file(path)
    wanted = dict(deltas(layers((spec,), state)))
    fused = {name: group for name, group in kohya_places(base).items() if len(group) == 3}
    assert fused
    for name, group in fused.items():
        up, down = tensors[f"{name}.lora_up.weight"], tensors[f"{name}.lora_down.weight"]
        ranks = [state[f"{layer}.lora_A.weight"].shape[0] for layer in group]
        assert down.shape[0] == sum(ranks)
        assert ranks in ([2, 4, 4], [4, 4, 4])
        change = float(tensors[f"{name}.alpha"]) / down.shape[0] * up @ down
        assert torch.allclose(change, torch.cat([wanted[f"{layer}.weight"] for layer in group]), atol=1e-6)


@pytest.mark.skipif("sd3" not in FAMILIES, reason="no SD3 here")
def test_sd3_files_that_were_trained_fused_are_split(learnt_by: Learn, tmp_path: Path):
    base = tiny("sd3")
    name, group = next((name, group) for name, group in kohya_places(base).items() if len(group) == 3)
    width = base_weights(base)[f"{group[0]}.weight"].shape
    generator = torch.Generator().manual_seed(0)
    down, up = (
        torch.randn(2, width[1], generator=generator),
        torch.randn(3 * width[0], 2, generator=generator),
    )
    save_file(
        {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(1.0)},
        tmp_path / "a.safetensors",
    )
    _, state, content = import_adapter(tmp_path / "a.safetensors", base, base="tiny")
    assert {layer.removesuffix(".lora_A.weight") for layer in state if "lora_A" in layer} == set(group)
    changes = dict(deltas(content.layers))
    got = torch.cat([changes[f"{layer}.weight"] for layer in group])
    assert torch.allclose(got, 0.5 * up @ down, atol=1e-5)


def test_tucker_forms_become_plain_ones(tmp_path: Path):
    """LoCon's middle, LoHa's cores and LoKr's core, against the formulas of LyCORIS written out."""
    base = tiny("sd1")
    ours = "denoiser.mid_block.resnets.0.conv1"
    out, inner = base_weights(base)[f"{ours}.weight"].shape[:2]
    g = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g)

    locon = {"lora_up.weight": drawn(out, 2, 1, 1), "lora_mid.weight": drawn(2, 2, 3, 3)}
    locon["lora_down.weight"] = drawn(2, inner, 1, 1)
    loha = {f"hada_w{n}_{s}": drawn(2, out if s == "a" else inner) for n in (1, 2) for s in "ab"}
    loha |= {"hada_t1": drawn(2, 2, 3, 3), "hada_t2": drawn(2, 2, 3, 3)}
    lokr = {"lokr_w1_a": drawn(2, 2), "lokr_w1_b": drawn(2, 2), "lokr_t2": drawn(2, 2, 3, 3)}
    lokr |= {"lokr_w2_a": drawn(2, out // 2), "lokr_w2_b": drawn(2, inner // 2)}
    wanted = {
        "locon": torch.einsum(
            "or,rshw,si->oihw", locon["lora_up.weight"][..., 0, 0], locon["lora_mid.weight"],
            locon["lora_down.weight"][..., 0, 0],
        ),
        "loha": torch.einsum("rshw,ro,si->oihw", loha["hada_t1"], loha["hada_w1_a"], loha["hada_w1_b"])
        * torch.einsum("rshw,ro,si->oihw", loha["hada_t2"], loha["hada_w2_a"], loha["hada_w2_b"]),
        "lokr": torch.einsum(
            "ac,bdhw->abcdhw",
            lokr["lokr_w1_a"] @ lokr["lokr_w1_b"],
            torch.einsum("rshw,rb,sd->bdhw", lokr["lokr_t2"], lokr["lokr_w2_a"], lokr["lokr_w2_b"]),
        ).reshape(out, inner, 3, 3),
    }  # fmt: skip
    for kind, leaves in {"locon": locon, "loha": loha, "lokr": lokr}.items():
        path = tmp_path / f"{kind}.safetensors"
        tensors = {f"lora_unet_mid_block_resnets_0_conv1.{leaf}": t for leaf, t in leaves.items()}
        save_file(tensors | {"lora_unet_mid_block_resnets_0_conv1.alpha": torch.tensor(1.0)}, path)
        card, state, content = import_adapter(path, base, base="tiny")
        (change,) = dict(deltas(content.layers, base_weights(base))).values()
        assert torch.allclose(change, 0.5 * wanted[kind], atol=1e-4)
        assert content.reduced is None
        again = layers(card.recipe.tuners, state)
        (same,) = dict(deltas(again, base_weights(base))).values()
        assert torch.allclose(same, change, atol=1e-5)


def test_a_rank_makes_a_plain_lora_and_says_what_is_lost(card_of: Cards, learnt_by: Learn, tmp_path: Path):
    base, spec = tiny("sd1"), LowRankSpec(kind="loha", rank=3, targets=r"mid_block\..*to_q")
    state = learnt_by(base, spec)
    list(export_adapter(tmp_path / "a.safetensors", card_of(base, spec), state, base, "kohya"))
    card, found, content = import_adapter(tmp_path / "a.safetensors", base, base="tiny", rank=2)
    assert {name.rpartition(".lora_")[2] for name in found} == {"A.weight", "B.weight"}
    assert content.reduced is not None
    wanted, got = dict(deltas(layers((spec,), state))), dict(deltas(layers(card.recipe.tuners, found)))
    lost = sum(float((wanted[n] - got[n]).square().sum()) for n in wanted)
    whole = sum(float(wanted[n].square().sum()) for n in wanted)
    assert 1 - content.reduced.kept == pytest.approx(lost / whole, abs=1e-5)
    assert 0.01 < lost / whole < 0.9


@pytest.mark.skipif("sd3" not in FAMILIES, reason="no SD3 here")
def test_what_diffusers_passes_over_is_said(card_of: Cards, learnt_by: Learn, tmp_path: Path):
    base, spec = tiny("sd3"), LowRankSpec(rank=2, towers={"text_encoder_3": 1e-4})
    state, card = learnt_by(base, spec), card_of(base, spec)
    events = list(export_adapter(tmp_path / "a.safetensors", card, state, base, "diffusers"))
    (note,) = (event for event in events if isinstance(event, Note))
    assert "diffusers passes over" in note.text
    assert "text_encoder_3" in note.text


@pytest.mark.skipif("sdxl" not in FAMILIES, reason="no SDXL here")
def test_sdxl_files_with_diffusers_names_are_read_too(card_of: Cards, learnt_by: Learn, tmp_path: Path):
    base, spec = tiny("sdxl"), LowRankSpec(rank=2)
    state = learnt_by(base, spec)
    list(export_adapter(tmp_path / "a.safetensors", card_of(base, spec), state, base, "kohya"))
    tensors = load_file(tmp_path / "a.safetensors")
    assert all("_blocks_" in name or "middle_block" in name for name in tensors)
    assert not any("down_blocks" in name for name in tensors)
    flat = {group[0]: name for name, group in kohya_places(base).items()}
    other = {
        f"lora_unet_{layer.removeprefix('denoiser.').replace('.', '_')}{key.removeprefix(name)}": tensor
        for layer, name in flat.items()
        for key, tensor in tensors.items()
        if key.startswith(f"{name}.")
    }
    save_file(other, tmp_path / "b.safetensors")
    found = read_file(tmp_path / "b.safetensors", base)
    assert found.unmatched == ()
    assert len(found.layers) == len(state) // 2


def test_old_diffusers_names_and_pefts_own_are_read(card_of: Cards, learnt_by: Learn, tmp_path: Path):
    base, spec = tiny("sd1"), LowRankSpec(rank=2, targets=r".*attn1\.to_(q|out\.0)")
    state = learnt_by(base, spec)
    wanted = dict(deltas(layers((spec,), state)))
    old: dict[str, Tensor] = {}
    peft: dict[str, Tensor] = {}
    for name, tensor in state.items():
        inside = name.removeprefix("denoiser.")
        peft[f"base_model.model.{inside}"] = tensor
        for ours, theirs in {"lora_A": "_lora.down", "lora_B": "_lora.up"}.items():
            if ours in inside:
                module = inside.removesuffix(f".{ours}.weight").replace("to_out.0", "to_out")
                old[f"unet.{module.replace('.attn1.', '.attn1.processor.')}{theirs}.weight"] = tensor
    for tensors in (old, peft):
        save_file(tensors, tmp_path / "a.safetensors")
        found = read_file(tmp_path / "a.safetensors", base)
        assert found.unmatched == ()
        got = dict(deltas(found.layers))
        assert got.keys() == wanted.keys()
        assert all(torch.equal(got[name], wanted[name]) for name in wanted)


def test_stray_tensors_are_counted_and_named(learnt_by: Learn, tmp_path: Path):
    base = tiny("sd1")
    stray = {"lora_unet_nowhere.lora_up.weight": torch.zeros(1), "lora_unet_conv_in.w_norm": torch.zeros(1)}
    save_file(plain_kohya(base, learnt_by) | stray, tmp_path / "a.safetensors")
    found = read_file(tmp_path / "a.safetensors", base)
    assert set(found.unmatched) == set(stray)
    assert found.matched == len(plain_kohya(base, learnt_by))


# ------------------------------------------------------------------ words


@pytest.mark.parametrize("form", ["embedding", "learned_embeds"])
@pytest.mark.parametrize("family", FAMILIES)
def test_words_come_back(family: str, form: str, card_of: Cards, learnt_by: Learn, tmp_path: Path):
    base, spec = tiny(family), TokensSpec(tokens={"<acme>": "shoe"}, vectors=2)
    state = learnt_by(base, spec)
    events = list(export_adapter(tmp_path / "out", card_of(base, spec), state, base, form))
    paths = [Path(event.path) for event in events if isinstance(event, Written)]
    assert len(paths) == (1 if form == "embedding" else len(base.towers))
    assert all(event.difference == 0 for event in events if isinstance(event, Checked))
    attached = attach_state(base, card_of(base, spec), state)
    with torch.no_grad():
        wanted = base.encode_prompts(["a <acme> fox"]).tokens
    attached.undo()
    joined: dict[str, Tensor] = {}
    for path in paths:
        _, found, _ = import_adapter(path, base, base="tiny", word="<acme>")
        joined |= found
    assert joined.keys() == state.keys()
    assert all(torch.equal(joined[name], state[name]) for name in state)
    if form == "embedding":
        back, _, _ = import_adapter(paths[0], base, base="tiny", word="<acme>")
        attached = attach_state(base, back, joined)
        with torch.no_grad():
            assert torch.equal(base.encode_prompts(["a <acme> fox"]).tokens, wanted)
        attached.undo()


def test_what_onetrainer_calls_its_tensor_is_read(tmp_path: Path):
    base = tiny("sd1")
    save_file({"emp_params": torch.ones(3, 32)}, tmp_path / "acme.safetensors")
    assert list(read_file(tmp_path / "acme.safetensors", base).words) == [("text_encoder", "acme")]


@pytest.mark.skipif("sd3" not in FAMILIES, reason="no SD3 here")
def test_what_onetrainer_calls_t5_is_read(tmp_path: Path):
    base = tiny("sd3")
    vectors = {"clip_l": torch.ones(1, 16), "clip_g": torch.ones(1, 32), "t5": torch.ones(1, 64)}
    save_file(vectors, tmp_path / "acme.safetensors")
    found = read_file(tmp_path / "acme.safetensors", base)
    assert found.unmatched == ()
    assert set(found.words) == {(tower, "acme") for tower in base.towers}


def test_words_that_a_lora_brings_along_are_read(learnt_by: Learn, tmp_path: Path):
    base = tiny("sd1")
    bundle = {"bundle_emb.acme.clip_l": torch.ones(2, 32)}
    save_file(plain_kohya(base, learnt_by) | bundle, tmp_path / "a.safetensors")
    found = read_file(tmp_path / "a.safetensors", base)
    assert found.unmatched == ()
    assert found.words[("text_encoder", "acme")].shape == (2, 32)


def test_words_beside_a_lora_are_not_lost_silently(card_of: Cards, learnt_by: Learn, tmp_path: Path):
    base, specs = tiny("sd1"), (TokensSpec(tokens={"<acme>": "shoe"}), LowRankSpec(rank=2))
    state, card = learnt_by(base, *specs), card_of(base, *specs)
    events = list(export_adapter(tmp_path / "a.safetensors", card, state, base, "kohya"))
    (note,) = (event for event in events if isinstance(event, Note))
    assert note.level == "warning"
    assert "the new words <acme> are not in this file" in note.text
    list(export_adapter(tmp_path / "<acme>.safetensors", card, state, base, "embedding"))
    assert load_file(tmp_path / "<acme>.safetensors").keys() == {"emb_params"}


# ------------------------------------------------------------------ what is refused


def over_inputs(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    name = "lora_unet_mid_block_attentions_0_transformer_blocks_0_ff_net_2"
    return tensors | {f"{name}.dora_scale": torch.ones(1, 256)}


REFUSED: dict[str, tuple[Callable[[dict[str, Tensor]], dict[str, Tensor]], str]] = {
    "another base": (lambda t: {n: torch.cat([x, x], -1) for n, x in t.items()}, "for another base model"),
    "half of it": (lambda t: {n: x for n, x in t.items() if "lora_up" in n}, "lacks a factor"),
    "a checkpoint": (
        lambda t: {"model.diffusion_model.input_blocks.0.0.weight": torch.ones(1, 1, 1, 1)},
        "a whole checkpoint: name it as a base",
    ),
    "something else": (lambda t: {"x": torch.ones(1, 1, 1)}, "of no format that livery reads"),
    "another family": (
        lambda t: {n.replace("attn1_to", "x_block_attn"): x for n, x in t.items() if "attn1_to" in n},
        "has a place in this base",
    ),
    "other widths": (lambda t: {"emb_params": torch.ones(1, 768)}, "no vectors for this base"),
    "DoRA over inputs": (over_inputs, "lengths are over inputs"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_imported_is_refused_in_one_sentence(name: str, learnt_by: Learn, tmp_path: Path):
    change, told = REFUSED[name]
    base = tiny("sd1")
    path = tmp_path / "a.safetensors"
    save_file(change(plain_kohya(base, learnt_by)), path)
    with pytest.raises(LiveryError) as refusal:
        import_adapter(path, base, base="tiny")
    assert told in str(refusal.value)
    assert str(path) in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_pickle_is_refused_with_how_to_convert_it(tmp_path: Path):
    path = tmp_path / "acme.pt"
    torch.save({"string_to_param": {"*": torch.zeros(1, 32)}}, path)
    with pytest.raises(LiveryError, match=r"a pickle, which can run code when read.*weights_only=True"):
        read_file(path, tiny("sd1"))


def test_a_word_of_an_old_pickle_is_read_once_it_is_converted(tmp_path: Path):
    """By the command that the refusal gives; A1111's `*` stands for the file's name."""
    base = tiny("sd1")
    width = word_widths(base)["text_encoder"]
    content = {"string_to_token": {"*": 265}, "string_to_param": {"*": torch.ones(2, width)}, "name": "acme"}
    torch.save(content, tmp_path / "FILE")
    exec(CONVERT.split('"')[1].replace("'FILE", f"'{tmp_path}/FILE"), {})
    found = read_file(tmp_path / "FILE.safetensors", base, "<acme>")
    assert {key: tuple(rows.shape) for key, rows in found.words.items()} == {
        ("text_encoder", "<acme>"): (2, width)
    }


def test_what_a_format_cannot_hold_is_said(card_of: Cards, learnt_by: Learn, tmp_path: Path):
    base, words = tiny("sd1"), TokensSpec(tokens={"<a>": "shoe", "<b>": "hat"})
    state, card = learnt_by(base, words), card_of(base, words)
    path = tmp_path / "a.safetensors"
    with pytest.raises(LiveryError, match="teaches words only: take the format embedding"):
        list(export_adapter(path, card, state, base, "kohya"))
    with pytest.raises(LiveryError, match=r"more than one file .*name a folder"):
        list(export_adapter(path, card, state, base, "embedding"))
    with pytest.raises(LiveryError, match="format: unknown key 'khoya': did you mean 'kohya'"):
        list(export_adapter(path, card, state, base, "khoya"))
    spec = LowRankSpec(rank=2)
    with pytest.raises(LiveryError, match="teaches no new word"):
        list(export_adapter(path, card_of(base, spec), learnt_by(base, spec), base, "embedding"))
    other = type(base).tiny(seed=1)
    with pytest.raises(LiveryError, match="was made for the base"):
        list(export_adapter(path, card, state, other, "embedding"))
    with pytest.raises(LiveryError, match=r"format kohya writes a file that ends in \.safetensors"):
        list(export_adapter(tmp_path / "acme", card, state, base, "kohya"))
    with pytest.raises(LiveryError, match="format folder writes a folder"):
        list(export_adapter(path, card, state, base, "folder"))
    assert list(tmp_path.iterdir()) == []
