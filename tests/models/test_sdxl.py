"""SDXL on its tiny model, against diffusers' own pipeline."""

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModelWithProjection

from livery.models.sdxl import SDXL
from livery.nouns import LiveryError

PROMPTS = ["a red fox", "many words " * 10, "né 42!"]


@pytest.fixture(scope="module")
def tiny() -> SDXL:
    return SDXL.tiny()


def rebuilt(base: SDXL, **parts: Any) -> SDXL:
    return cast(Any, SDXL)(**{**base.components(), **parts})


def asked(base: SDXL, **options: Any) -> tuple[dict[str, Any], Tensor]:
    """What diffusers' pipeline asks the U-Net in the only step of a drawing, and what it answers."""
    calls: list[tuple[Any, Any, Any]] = []
    hook = base.unet.register_forward_hook(lambda _, *call: calls.append(call), with_kwargs=True)
    pipe: Any = base.pipeline()
    generator = torch.Generator().manual_seed(0)
    try:
        pipe(num_inference_steps=1, generator=generator, output_type="latent", **options)
    finally:
        hook.remove()
    ((noisy, t), given, answer), *more = calls
    assert not more
    return {"noisy": noisy, "t": t, **given}, answer[0]


def test_prompts_are_encoded_as_the_pipeline_encodes_them(tiny: SDXL):
    rows = tiny.encode_prompts(PROMPTS)
    pipe: Any = tiny.pipeline()
    tokens, _, pooled, _ = pipe.encode_prompt(PROMPTS, device="cpu", do_classifier_free_guidance=False)
    assert rows.tokens.shape == (3, 16, 48)
    assert torch.equal(rows.tokens, tokens)
    assert rows.pooled is not None
    assert torch.equal(rows.pooled, pooled)


@pytest.mark.parametrize("zeros", [True, False])
def test_the_empty_prompt_is_what_the_pipeline_guides_away_from(tiny: SDXL, zeros: bool):
    base = rebuilt(tiny, force_zeros_for_empty_prompt=zeros)
    rows = base.encode_prompts(["a cat", ""])
    pipe: Any = base.pipeline()
    tokens, negative, pooled, negative_pooled = pipe.encode_prompt("a cat", device="cpu")
    assert torch.allclose(rows.tokens, torch.cat([tokens, negative]), atol=1e-6)
    assert torch.allclose(cast(Tensor, rows.pooled), torch.cat([pooled, negative_pooled]), atol=1e-6)
    assert bool(rows.tokens[1].any()) is not zeros
    assert (base.sha256 == tiny.sha256) is zeros


def test_a_batch_of_empty_prompts_alone_can_still_be_trained(tiny: SDXL):
    weight = tiny.towers["text_encoder"].get_parameter("embeddings.token_embedding.weight")
    weight.requires_grad_(True)
    try:
        tiny.encode_prompts(["", ""]).tokens.sum().backward()
        assert weight.grad is not None
        assert not weight.grad.any()
    finally:
        weight.requires_grad_(False).grad = None


def test_the_u_net_is_asked_as_the_pipeline_asks(tiny: SDXL):
    given, answer = asked(tiny, prompt=PROMPTS[:1], guidance_scale=1.0)
    row = tiny.encode_prompts(PROMPTS[:1])
    assert torch.equal(given["added_cond_kwargs"]["time_ids"], torch.tensor([[32.0, 32, 0, 0, 32, 32]]))
    assert torch.allclose(tiny.predict(given["noisy"], given["t"], row), answer, atol=1e-6)


def test_size_is_original_crop_target_height_first(tiny: SDXL):
    told = {"original_size": (640, 480), "crops_coords_top_left": (8, 16), "target_size": (512, 256)}
    given, answer = asked(tiny, prompt=PROMPTS[:1], guidance_scale=1.0, **told)
    row = tiny.encode_prompts(PROMPTS[:1])
    sized = replace(row, size=torch.tensor([[640, 480, 8, 16, 512, 256]]))
    assert torch.allclose(tiny.predict(given["noisy"], given["t"], sized), answer, atol=1e-6)
    assert not torch.allclose(tiny.predict(given["noisy"], given["t"], row), answer, atol=1e-4)


def test_added_words_do_not_move_the_place_where_prompts_are_pooled(tiny: SDXL):
    """With the configurations of old (eos_token_id 2), transformers would pool at the largest id."""
    tower = CLIPTextModelWithProjection(copy.deepcopy(cast(Any, tiny.towers["text_encoder_2"].config)))
    tower.load_state_dict(tiny.towers["text_encoder_2"].state_dict())
    tower.config.eos_token_id = 2
    cast(Any, tower).text_model.eos_token_id = 2
    base = rebuilt(SDXL.tiny(), text_encoder_2=tower)
    plain = base.encode_prompts(["a cat"]).tensors()
    assert all(torch.equal(part, plain[n]) for n, part in tiny.encode_prompts(["a cat"]).tensors().items())
    words = base.tokenizers["text_encoder_2"]
    words.add_tokens(["<acme>"])
    tower.resize_token_embeddings(len(words))
    ids = base.tokenize("text_encoder_2", ["a <acme> cat"])["input_ids"]
    end = ids[0].tolist().index(words.eos_token_id)
    assert ids.max() > words.eos_token_id
    last = tower(ids).last_hidden_state
    pooled = base.encode_prompts(["a <acme> cat"]).pooled
    assert pooled is not None
    assert torch.allclose(pooled, tower.text_projection(last[:, end]), atol=1e-6)


def test_the_setting_of_the_index_is_read_and_written(tiny: SDXL, tmp_path: Path):
    base = rebuilt(tiny, force_zeros_for_empty_prompt=False)
    base.save(tmp_path / "base")
    assert SDXL.load(tmp_path / "base").sha256 == base.sha256
    index = tmp_path / "base/model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "force_zeros_for_empty_prompt": True}))
    assert SDXL.load(tmp_path / "base").force_zeros_for_empty_prompt


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"in_channels": 9}, "takes 9 channels but the latents have 4"),
        ({"cross_attention_dim": 32}, "reads text 32 wide but both text encoders gives 48"),
        ({"addition_embed_type": None}, "reads no picture sizes"),
        ({"projection_class_embeddings_input_dim": 5 * 8 + 24}, "reads 64 numbers .* refiner"),
    ],
)
def test_a_special_u_net_is_refused(tiny: SDXL, changes: dict[str, Any], told: str):
    unet = UNet2DConditionModel.from_config({**tiny.unet.config, **changes})
    with pytest.raises(LiveryError, match=told):
        rebuilt(tiny, unet=unet)


def test_an_autoencoder_that_scales_each_channel_is_refused(tiny: SDXL):
    vae: Any = SDXL.tiny().vae
    vae.register_to_config(latents_mean=[0.0] * 4, latents_std=[1.0] * 4)
    with pytest.raises(LiveryError, match="latents_mean"):
        rebuilt(tiny, vae=vae)


def test_a_broken_folder_is_refused_with_one_sentence(tiny: SDXL, tmp_path: Path):
    tiny.save(tmp_path / "base")
    (tmp_path / "base/tokenizer_2/tokenizer.json").unlink()
    with pytest.raises(LiveryError, match=r"tokenizer_2/vocab\.json and merges\.txt are missing"):
        SDXL.load(tmp_path / "base")
    (tmp_path / "base/text_encoder_2/model.safetensors").rename(tmp_path / "base/text_encoder_2/model.bin")
    with pytest.raises(LiveryError, match=r"model\.bin: a pickle"):
        SDXL.load(tmp_path / "base")
