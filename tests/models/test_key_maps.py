"""Key maps of full-size and tiny models, against diffusers' own converters."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from diffusers.loaders import single_file_utils as theirs
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from livery.models import architectures
from livery.models.architectures import NAMES, architecture
from livery.models.key_maps import Entry, openclip
from livery.models.layouts import LAYOUTS
from livery.models.sd1 import SD1
from livery.models.sd3 import SD3
from livery.models.sdxl import SDXL
from livery.nouns import LiveryError

TINY = {
    "sd1": SD1.tiny,
    "sd2": lambda: SD1.tiny(prediction="v_prediction"),
    "sdxl": SDXL.tiny,
    "sd3": lambda: SD3.tiny(version="3"),
    "sd3.5": SD3.tiny,
}


def tiny_parts() -> Iterator[tuple[str, str]]:
    for name in TINY:
        layout = LAYOUTS[name.removesuffix(".5")]
        yield from ((name, part) for part in layout.parts)


@pytest.fixture(scope="module")
def models() -> dict[str, dict[str, Any]]:
    return {name: dict(make().pipeline().components) for name, make in TINY.items()}


def original(layout: str, part: str, module: Any) -> tuple[list[Entry], dict[str, Tensor]]:
    """The map of a module, and its weights as the original layout has them."""
    state = module.state_dict()
    config = module.config if isinstance(module.config, dict) else module.config.to_dict()
    entries = LAYOUTS[layout].entries(part, config, state)
    return entries, {e.theirs: e.way.join([state[name] for name in e.ours]) for e in entries}


@pytest.mark.parametrize(("name", "part"), list(tiny_parts()))
def test_a_map_is_a_bijection(models: dict[str, dict[str, Any]], name: str, part: str):
    """Every weight of ours has one place in theirs, and comes back the same."""
    module = models[name][part]
    entries, written = original(name.removesuffix(".5"), part, module)
    assert len(written) == len(entries)
    back = {
        ours: piece
        for entry in entries
        for ours, piece in zip(
            entry.ours, entry.way.split(written[entry.theirs], len(entry.ours)), strict=True
        )
    }
    state = module.state_dict()
    shared = {"encoder.embed_tokens.weight"} if part == "text_encoder_3" else set()
    assert set(back) == set(state) - shared
    assert all(torch.equal(back[ours], state[ours]) for ours in back)


@pytest.mark.parametrize("name", NAMES)
def test_full_size_maps_have_a_place_for_every_weight(name: str):
    shapes = architecture(name)
    layout = LAYOUTS[shapes.layout]
    assert set(shapes.modules) == set(layout.parts)
    for part in shapes.modules:
        with torch.device("meta"):
            module = architectures.build(shapes.parts[part], part)
        state = module.state_dict()
        entries = layout.entries(part, shapes.parts[part], state)
        ours = [name for entry in entries for name in entry.ours]
        assert sorted({*ours, *(state.keys() & {"encoder.embed_tokens.weight"})}) == sorted(state)
        assert len(ours) == len(set(ours))


# ------------------------------------------------------------------ diffusers as the oracle


@pytest.mark.parametrize("name", ["sd1", "sd2", "sdxl"])
def test_unets_are_converted_as_diffusers_converts_them(models: dict[str, dict[str, Any]], name: str):
    unet = models[name]["unet"]
    _, written = original(name, "unet", unet)
    equal(theirs.convert_ldm_unet_checkpoint(written, dict(unet.config)), unet.state_dict())


@pytest.mark.parametrize("name", TINY)
def test_autoencoders_are_converted_as_diffusers_converts_them(models: dict[str, dict[str, Any]], name: str):
    vae = models[name]["vae"]
    _, written = original(name.removesuffix(".5"), "vae", vae)
    assert written["first_stage_model.encoder.mid.attn_1.q.weight"].ndim == 4
    equal(theirs.convert_ldm_vae_checkpoint(written, dict(vae.config)), vae.state_dict())


@pytest.mark.parametrize("name", ["sd3", "sd3.5"])
def test_transformers_are_converted_as_diffusers_converts_them(models: dict[str, dict[str, Any]], name: str):
    transformer = models[name]["transformer"]
    _, written = original("sd3", "transformer", transformer)
    equal(theirs.convert_sd3_transformer_checkpoint_to_diffusers(dict(written)), transformer.state_dict())


@pytest.mark.parametrize(("name", "part"), [("sd1", "text_encoder"), ("sdxl", "text_encoder")])
def test_clips_are_converted_as_diffusers_converts_them(
    models: dict[str, dict[str, Any]], name: str, part: str
):
    _, written = original(name, part, models[name][part])
    converted = theirs.convert_ldm_clip_checkpoint(written)
    plain = {key.removeprefix("text_model."): tensor for key, tensor in converted.items()}
    equal(plain, models[name][part].state_dict())


@pytest.mark.parametrize(
    ("name", "part", "prefix"),
    [
        ("sd2", "text_encoder", "cond_stage_model.model."),
        ("sdxl", "text_encoder_2", "conditioner.embedders.1.model."),
    ],
)
def test_openclips_are_converted_as_diffusers_converts_them(
    models: dict[str, dict[str, Any]], name: str, part: str, prefix: str
):
    tower = models[name][part]
    _, written = original(name, part, tower)
    # diffusers takes the width of the stacked matrix from the projection, which is square in real models
    square = torch.empty(tower.config.hidden_size, tower.config.hidden_size)
    converted = theirs.convert_open_clip_checkpoint(
        tower, {**written, f"{prefix}text_projection": square}, prefix=prefix
    )
    converted["text_projection.weight"] = written.get(f"{prefix}text_projection", square).T
    if name == "sd2":
        del converted["text_projection.weight"]
        converted = {key.removeprefix("text_model."): tensor for key, tensor in converted.items()}
    equal(converted, tower.state_dict())


def test_sd3_text_encoders_are_found_by_diffusers(models: dict[str, dict[str, Any]]):
    written = dict[str, Tensor]()
    for part in ("text_encoder", "text_encoder_2", "text_encoder_3"):
        written |= original("sd3", part, models["sd3"][part])[1]
    assert theirs.is_clip_sd3_model(written)
    assert theirs.is_open_clip_sd3_model(written)
    assert theirs.is_t5_in_single_file(written)
    for part, name in (("text_encoder", "clip_l"), ("text_encoder_2", "clip_g")):
        converted = theirs.convert_ldm_clip_checkpoint(written, f"text_encoders.{name}.transformer.")
        equal(converted, models["sd3"][part].state_dict())
    t5 = theirs.convert_sd3_t5_checkpoint_to_diffusers(written)
    equal(
        {**t5, "encoder.embed_tokens.weight": t5["shared.weight"]},
        models["sd3"]["text_encoder_3"].state_dict(),
    )


def equal(converted: dict[str, Tensor], state: dict[str, Tensor]) -> None:
    assert set(converted) == set(state)
    for name, tensor in state.items():
        assert torch.equal(converted[name], tensor), name


KINDS = {
    "sd1.5": "v1",
    "sd2.1": "v2",
    "sd2.1-base": "v2",
    "sdxl": "xl_base",
    "sd3-medium": "sd3",
    "sd3.5-medium": "sd35_medium",
    "sd3.5-large": "sd35_large",
}


@pytest.mark.parametrize("name", NAMES)
def test_diffusers_knows_a_full_size_file_by_its_names_and_shapes(name: str):
    shapes, written = architecture(name), dict[str, Tensor]()
    for part in shapes.modules:
        with torch.device("meta"):
            state = architectures.build(shapes.parts[part], part).state_dict()
        for entry in LAYOUTS[shapes.layout].entries(part, shapes.parts[part], state):
            written[entry.theirs] = entry.way.join([state[ours] for ours in entry.ours])
    assert theirs.infer_diffusers_model_type(written) == KINDS[name]


# ------------------------------------------------------------------ what the maps mean


def test_stacked_queries_keys_and_values_attend_as_openclip_does():
    """One layer of ours against torch's own MultiheadAttention, whose weights OpenCLIP stores."""
    config = CLIPTextConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=20
    )
    torch.manual_seed(0)
    model: Any = CLIPTextModel(config).eval()
    state = model.state_dict()
    written = {
        e.theirs: e.way.join([state[name] for name in e.ours]) for e in openclip(config.to_dict(), state)
    }
    prefix = "transformer.resblocks.0.attn."
    attention = torch.nn.MultiheadAttention(16, 2, batch_first=True)
    attention.load_state_dict(
        {key.removeprefix(prefix): tensor for key, tensor in written.items() if key.startswith(prefix)}
    )
    hidden = torch.randn(1, 5, 16)
    mask = torch.full((5, 5), float("-inf")).triu(1)
    expected = attention(hidden, hidden, hidden, attn_mask=mask, need_weights=False)[0]
    layer = model.encoder.layers[0].self_attn
    torch.testing.assert_close(layer(hidden, attention_mask=mask[None, None])[0], expected)


def test_the_projection_is_transposed():
    config = CLIPTextConfig(
        hidden_size=16, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, projection_dim=4
    )
    state = CLIPTextModelWithProjection(config).state_dict()
    found = {e.theirs: e for e in openclip(config.to_dict(), state)}["text_projection"]
    assert found.way.join([state["text_projection.weight"]]).shape == (16, 4)  # x @ text_projection


def test_layers_per_block_may_differ():
    config = {
        "_class_name": "UNet2DConditionModel",
        "block_out_channels": [16, 32],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
        "layers_per_block": [1, 2],
        "cross_attention_dim": 8,
        "attention_head_dim": 2,
        "norm_num_groups": 4,
    }
    with torch.device("meta"):
        state = architectures.build(config, "unet").state_dict()
    entries = LAYOUTS["sd1"].entries("unet", config, state)
    assert len(entries) == len(state)
    last = "model.diffusion_model.output_blocks.4.0.in_layers.0.weight"
    assert {e.theirs: e.ours for e in entries}[last] == ("up_blocks.1.resnets.1.norm1.weight",)


def test_a_weight_without_a_place_is_refused():
    config = architecture("sd1.5").parts["unet"]
    with pytest.raises(LiveryError, match=r"class_embedding\.weight has no place in the original layout"):
        LAYOUTS["sd1"].entries("unet", config, ["class_embedding.weight"])
