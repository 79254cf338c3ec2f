"""Our files in other people's readers: diffusers' loaders and converters, LyCORIS' formulas written out."""

import json
import warnings
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from diffusers.loaders.lora_conversion_utils import (
    _convert_non_diffusers_lora_to_diffusers,  # pyright: ignore[reportPrivateUsage]
    _maybe_map_sgm_blocks_to_diffusers,  # pyright: ignore[reportPrivateUsage]
)
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.utils.state_dict_utils import convert_state_dict_to_kohya, convert_unet_state_dict_to_peft
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from livery import plugins
from livery.models.architectures import meta_parts
from livery.models.backbone import Backbone
from livery.nouns import AdapterCard, LowRankSpec, TokensSpec
from livery.tuners.adapter_file import attach_state
from livery.tuners.delta import base_weights, deltas, layers
from livery.tuners.export import Style, export_adapter
from livery.tuners.formats.names import adaptable, kohya_places
from livery.tuners.importing import read_file

Learn = Callable[..., dict[str, Tensor]]
Cards = Callable[..., AdapterCard]
FAMILIES = list(plugins.families())
T5 = "text_encoder_3"


@cache
def tiny(family: str) -> Backbone:
    return plugins.families()[family].tiny()


def draw(pipe: DiffusionPipeline) -> np.ndarray:
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return cast(Any, pipe)("a fox", num_inference_steps=1, generator=generator, output_type="np").images


@cache
def plain_picture(family: str) -> np.ndarray:
    return draw(tiny(family).pipeline())


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """A pipeline of diffusers' own on the same weights, for each family loaded from a folder once."""
    folder = tmp_path_factory.mktemp("bases")

    @cache
    def load(family: str) -> Any:
        tiny(family).save(folder / family)
        return DiffusionPipeline.from_pretrained(folder / family, local_files_only=True)

    return load


CASES = {
    "kohya": ("kohya", Style(), ["sd1", "sdxl"]),
    "diffusers": ("diffusers", Style(), ["sd1", "sdxl", "sd3"]),
    "diffusers, folded": ("diffusers", Style(fold_alpha=True), ["sdxl"]),
}
SPECS = {
    "towers": LowRankSpec(rank=3, alpha=5),
    "mixed ranks and alphas": LowRankSpec(rank=4, ranks={r".*to_q": 2}, alphas={r".*to_v": 1.5}),
    "convolutions": LowRankSpec(rank=2, alpha=3, targets=r".*(conv1|conv2|conv|conv_in|proj|proj_in|to_k)"),
    "dora": LowRankSpec(rank=3, dora=True),
}


ROWS = [
    (family, case, name)
    for case, (_, _, families) in CASES.items()
    for family in families
    for name in SPECS
    # diffusers leaves dora_scale out of kohya's files, and says so; folding is the same for every layer
    if family in FAMILIES
    and not (name == "dora" and case == "kohya")
    and not (name != "towers" and "folded" in case)
]


@pytest.mark.parametrize(("family", "case", "name"), ROWS)
def test_diffusers_draws_the_same_picture(
    family: str,
    case: str,
    name: str,
    stock: Callable[[str], Any],
    card_of: Cards,
    learnt_by: Learn,
    tmp_path: Path,
):
    base, (form, style, _) = tiny(family), CASES[case]
    towers = {tower: 1e-4 for tower in base.towers if tower != T5}
    spec = SPECS[name].model_copy(update={"towers": towers if name == "towers" else {}})
    state, card = learnt_by(base, spec), card_of(base, spec)
    path = tmp_path / "pytorch_lora_weights.safetensors"
    list(export_adapter(path, card, state, base, form, style))
    plain = plain_picture(family)
    attached = attach_state(base, card, state)
    wanted = draw(base.pipeline())
    attached.undo()
    assert np.abs(wanted - plain).max() > 1e-3
    pipe = stock(family)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)  # peft's word for settings that it could not place
        pipe.load_lora_weights(str(path))
    got = draw(pipe)
    pipe.unload_lora_weights()
    assert np.allclose(got, wanted, atol=1e-5)


def test_the_converter_of_diffusers_loses_alpha_and_ours_does_not(
    card_of: Cards, learnt_by: Learn, tmp_path: Path
):
    base, spec = tiny("sd1"), LowRankSpec(rank=4, alpha=2)
    state = learnt_by(base, spec)
    wanted = dict(deltas(layers((spec,), state)))
    peft = {f"unet.{name.removeprefix('denoiser.')}": tensor for name, tensor in state.items()}
    theirs = convert_state_dict_to_kohya(peft)
    save_file({name: tensor.contiguous() for name, tensor in theirs.items()}, tmp_path / "theirs.safetensors")
    list(export_adapter(tmp_path / "ours.safetensors", card_of(base, spec), state, base, "kohya"))
    for file, factor in (("theirs", 4 / 2), ("ours", 1)):
        found = read_file(tmp_path / f"{file}.safetensors", base)
        got = dict(deltas(found.layers))
        assert got.keys() == wanted.keys()
        assert all(torch.allclose(got[name], factor * wanted[name]) for name in wanted)


# ------------------------------------------------------------------ names, on the true shapes


def true_shape(name: str, family: str) -> Any:
    """What the name tables read of a base: its modules, without weights."""
    parts = meta_parts(name)
    towers = {part: module for part, module in parts.items() if part not in ("denoiser", "vae")}
    return SimpleNamespace(
        family=family,
        denoiser=parts["denoiser"],
        towers=towers,
        modules=lambda: {"denoiser": parts["denoiser"], **towers},
    )


def kohyas_own(base: Any) -> Mapping[str, tuple[str, ...]]:
    """What kohya's scripts adapt: matrices and 1 x 1 convolutions of transformers, attention and MLP."""
    modules: dict[str, nn.Linear | nn.Conv2d] = adaptable(base)

    def adapted(layer: str) -> bool:
        if layer.startswith("denoiser."):
            return ".attentions." in layer
        return ".self_attn." in layer or ".mlp." in layer

    assert all(module.weight.is_meta for module in modules.values())
    return {name: group for name, group in kohya_places(base).items() if adapted(group[0])}


@pytest.mark.parametrize(
    ("name", "family", "counts"),
    [
        ("sd1.5", "sd1", {"lora_unet": 192, "lora_te": 72}),
        ("sdxl", "sdxl", {"lora_unet": 722, "lora_te1": 72, "lora_te2": 192}),
    ],
)
def test_as_many_layers_as_kohyas_scripts_say_they_create(name: str, family: str, counts: dict[str, int]):
    if family not in FAMILIES:
        pytest.skip("no such family here")
    names = list(kohyas_own(true_shape(name, family)))
    assert {p: sum(each.startswith(f"{p}_") for each in names) for p in counts} == counts


@pytest.mark.skipif("sdxl" not in FAMILIES, reason="no SDXL here")
def test_every_name_of_sdxl_goes_through_diffusers_own_converter():
    """Convolutions of resnets, samplers and ends included: our layer comes out at the other end."""
    base = true_shape("sdxl", "sdxl")
    places = kohya_places(base)
    tensors = {
        f"{name}.lora_{side}.weight": torch.full((1, 1), float(number))
        for number, name in enumerate(places)
        for side in ("down", "up")
        if not name.startswith("lora_te")
    }
    mapped = _maybe_map_sgm_blocks_to_diffusers(dict(tensors), base.denoiser.config)
    converted, _ = _convert_non_diffusers_lora_to_diffusers(mapped)
    found = convert_unet_state_dict_to_peft(converted)
    wanted = {number: group[0] for number, group in enumerate(places.values())}
    downs = {name: tensor for name, tensor in found.items() if name.endswith(".lora_A.weight")}
    assert len(downs) == len(tensors) // 2 > 722
    for name, tensor in downs.items():
        ours = name.removeprefix("unet.").removesuffix(".lora_A.weight")
        assert f"denoiser.{ours}" == wanted[int(tensor)]


@pytest.mark.parametrize("key", [
    "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q",
    "lora_unet_middle_block_1_transformer_blocks_9_ff_net_0_proj",
    "lora_unet_output_blocks_0_1_proj_in",
    "lora_unet_input_blocks_3_0_op",
    "lora_unet_output_blocks_2_2_conv",
    "lora_unet_label_emb_0_0",
    "lora_te1_text_model_encoder_layers_11_mlp_fc1",
    "lora_te2_text_model_encoder_layers_31_self_attn_out_proj",
])  # fmt: skip
def test_names_seen_in_sdxl_files_of_others_are_known(key: str):
    if "sdxl" in FAMILIES:
        assert key in kohya_places(true_shape("sdxl", "sdxl"))


@pytest.mark.parametrize("key", [
    "lora_unet_joint_blocks_0_x_block_attn_qkv",
    "lora_unet_joint_blocks_23_context_block_attn_qkv",
    "lora_unet_joint_blocks_22_context_block_mlp_fc2",
    "lora_unet_joint_blocks_0_x_block_adaLN_modulation_1",
    "lora_unet_final_layer_linear",
    "lora_te1_text_model_encoder_layers_0_self_attn_q_proj",
    "lora_te3_encoder_block_0_layer_0_SelfAttention_q",
])  # fmt: skip
def test_names_seen_in_sd3_files_of_others_are_known(key: str):
    if "sd3" in FAMILIES:
        assert key in kohya_places(true_shape("sd3-medium", "sd3"))


# ------------------------------------------------------------------ LyCORIS


@pytest.mark.parametrize("kind", ["loha", "lokr"])
def test_lycoris_formulas_give_the_delta(kind: Any, card_of: Cards, learnt_by: Learn, tmp_path: Path):
    """From the bare tensors, in numpy: alpha / dim times the product, as LyCORIS, A1111 and ComfyUI do."""
    base = tiny("sd1")
    targets = r"mid_block\.(resnets\.0\.conv1|attentions\.0\.transformer_blocks\.0\.(attn1\.to_q|ff\.net\.2))"
    spec = LowRankSpec(kind=kind, rank=2, alpha=3, targets=targets)
    state = learnt_by(base, spec)
    list(export_adapter(tmp_path / "a.safetensors", card_of(base, spec), state, base, "kohya"))
    tensors = {name: t.double().numpy() for name, t in load_file(tmp_path / "a.safetensors").items()}
    wanted = dict(deltas(layers((spec,), state), base_weights(base)))
    assert len(wanted) == 3
    for param, change in wanted.items():
        name = f"lora_unet_{param.removeprefix('denoiser.').removesuffix('.weight').replace('.', '_')}"
        leaf = {key.removeprefix(f"{name}."): t for key, t in tensors.items() if key.startswith(f"{name}.")}
        scale = float(leaf["alpha"])
        if kind == "loha":
            product = (leaf["hada_w1_a"] @ leaf["hada_w1_b"]) * (leaf["hada_w2_a"] @ leaf["hada_w2_b"])
            scale /= leaf["hada_w1_b"].shape[0]
        else:
            whole = "lokr_w2" in leaf
            second = leaf["lokr_w2"] if whole else leaf["lokr_w2_a"] @ leaf["lokr_w2_b"]
            scale = 1.0 if whole else scale / leaf["lokr_w2_b"].shape[0]
            first = leaf["lokr_w1"].reshape(*leaf["lokr_w1"].shape, *[1] * (second.ndim - 2))
            product = np.kron(first, second)
        got = torch.from_numpy(scale * product).float().reshape(change.shape)
        assert torch.allclose(got, change, atol=1e-6)


# ------------------------------------------------------------------ words


@pytest.mark.parametrize(("form", "token"), [("embedding", "<acme>"), ("learned_embeds", None)])
def test_diffusers_encodes_a_new_word_alike(
    form: str,
    token: str | None,
    card_of: Cards,
    learnt_by: Learn,
    tmp_path: Path,
):
    base, spec = tiny("sd1"), TokensSpec(tokens={"<acme>": "shoe"}, vectors=2)
    state, card = learnt_by(base, spec), card_of(base, spec)
    list(export_adapter(tmp_path / "acme.safetensors", card, state, base, form))
    attached = attach_state(base, card, state)
    with torch.no_grad():
        wanted = base.encode_prompts(["a <acme> fox"]).tokens
    attached.undo()
    base.save(tmp_path / "base")
    pipe = cast(Any, DiffusionPipeline.from_pretrained(tmp_path / "base", local_files_only=True))
    pipe.load_textual_inversion(str(tmp_path / "acme.safetensors"), token=token)
    with torch.no_grad():
        got, _ = pipe.encode_prompt("a <acme> fox", "cpu", 1, False)
    assert torch.allclose(got, wanted, atol=1e-6)


@pytest.mark.skipif("sdxl" not in FAMILIES, reason="no SDXL here")
def test_diffusers_encodes_sdxls_pair_alike(card_of: Cards, learnt_by: Learn, tmp_path: Path):
    base, spec = tiny("sdxl"), TokensSpec(tokens={"<acme>": "shoe"})
    state, card = learnt_by(base, spec), card_of(base, spec)
    list(export_adapter(tmp_path / "acme.safetensors", card, state, base, "embedding"))
    attached = attach_state(base, card, state)
    with torch.no_grad():
        wanted = base.encode_prompts(["a <acme> fox"])
    attached.undo()
    base.save(tmp_path / "base")
    pipe = cast(Any, DiffusionPipeline.from_pretrained(tmp_path / "base", local_files_only=True))
    vectors = load_file(tmp_path / "acme.safetensors")
    for key, number in {"clip_l": "", "clip_g": "_2"}.items():
        parts = {kind: getattr(pipe, f"{kind}{number}") for kind in ("text_encoder", "tokenizer")}
        pipe.load_textual_inversion(vectors[key], token="<acme>", **parts)
    with torch.no_grad():
        got = pipe.encode_prompt(
            "a <acme> fox", device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
        )
    assert torch.allclose(got[0], wanted.tokens, atol=1e-5)
    assert wanted.pooled is not None
    assert torch.allclose(got[2], wanted.pooled, atol=1e-5)


def test_an_a1111_file_has_one_tensor(card_of: Cards, learnt_by: Learn, tmp_path: Path):
    """A1111 takes any file with one tensor, and fails on several."""
    base, spec = tiny("sd1"), TokensSpec(tokens={"<acme>": "shoe"}, vectors=3)
    state = learnt_by(base, spec)
    list(export_adapter(tmp_path / "acme.safetensors", card_of(base, spec), state, base, "embedding"))
    content = (tmp_path / "acme.safetensors").read_bytes()
    size = int.from_bytes(content[:8], "little")
    told = json.loads(content[8 : 8 + size])
    assert set(told) == {"__metadata__", "emb_params"}
    assert told["emb_params"]["shape"] == [3, 32]


@pytest.mark.skipif("sd3" not in FAMILIES, reason="no SD3 here")
@pytest.mark.parametrize("spec", [SPECS["towers"], SPECS["dora"], LowRankSpec(kind="loha", rank=2)])
def test_what_lies_otherwise_in_sd3_files_is_turned(
    spec: LowRankSpec, card_of: Cards, learnt_by: Learn, tmp_path: Path
):
    """The last modulations: ComfyUI adds alpha / rank * up @ down to weights whose halves are swapped."""
    base = tiny("sd3")
    last = int(cast(Any, base.denoiser).config["num_layers"]) - 1
    inner = r"norm_out\.linear|transformer_blocks\.\d+\.norm1_context\.linear"
    spec = spec.model_copy(update={"targets": inner})
    state = learnt_by(base, spec)
    path = tmp_path / "a.safetensors"
    list(export_adapter(path, card_of(base, spec), state, base, "kohya"))
    assert len(read_file(path, base).layers) == last + 2
    if spec.kind != "lora" or spec.dora:
        return
    tensors, wanted = load_file(path), dict(deltas(layers((spec,), state)))
    for theirs, ours, turned in (
        ("final_layer", "norm_out.linear", True),
        (f"joint_blocks_{last}_context_block", f"transformer_blocks.{last}.norm1_context.linear", True),
        ("joint_blocks_0_context_block", "transformer_blocks.0.norm1_context.linear", False),
    ):
        name = f"lora_unet_{theirs}_adaLN_modulation_1"
        up, down = tensors[f"{name}.lora_up.weight"], tensors[f"{name}.lora_down.weight"]
        change = float(tensors[f"{name}.alpha"]) / down.shape[0] * up @ down
        first, second = wanted[f"denoiser.{ours}.weight"].chunk(2)
        assert torch.allclose(change, torch.cat([second, first] if turned else [first, second]), atol=1e-6)
