"""SD3 and SD3.5 on their tiny models, against diffusers' own pipeline."""

import json
import shutil
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from torch import Tensor

from livery.models.noise import Flow
from livery.models.sd3 import SD3
from livery.nouns import LiveryError

PROMPTS = ["a red fox", "", "many words " * 10, "né 42!"]
MAKES: dict[str, dict[str, Any]] = {"3": {"version": "3"}, "3.5": {}, "without t5": {"t5": False}}


@pytest.fixture(scope="module", params=MAKES)
def tiny(request: pytest.FixtureRequest) -> SD3:
    return SD3.tiny(**MAKES[request.param])


def rebuilt(base: SD3, **parts: Any) -> SD3:
    return cast(Any, SD3)(**{**base.components(), **parts})


def encoded_by_diffusers(base: SD3, prompts: list[str]) -> tuple[Tensor, Tensor]:
    pipe: Any = base.pipeline()
    length = base.lengths.get("text_encoder_3", 256)
    tokens, _, pooled, _ = pipe.encode_prompt(
        prompts, prompts, prompts, do_classifier_free_guidance=False, max_sequence_length=length
    )
    return tokens, pooled


def test_prompts_are_encoded_as_the_pipeline_encodes_them(tiny: SD3):
    rows = tiny.encode_prompts(PROMPTS)
    tokens, pooled = encoded_by_diffusers(tiny, PROMPTS)
    assert rows.tokens.shape == (4, 16 + (24 if "text_encoder_3" in tiny.towers else 256), 64)
    assert torch.equal(rows.tokens, tokens)
    assert torch.equal(cast(Tensor, rows.pooled), pooled)


def test_without_t5_its_tokens_are_zeros_and_clip_is_padded():
    whole, without = SD3.tiny(), SD3.tiny(t5=False)
    ours, theirs = without.encode_prompts(["a cat"]), whole.encode_prompts(["a cat"])
    assert not ours.tokens[:, 16:].any()
    assert theirs.tokens[:, 16:].any(dim=-1).all()
    assert ours.tokens[:, :16, : 16 + 32].any()
    assert not ours.tokens[:, :16, 16 + 32 :].any()


def test_the_transformer_is_asked_as_the_pipeline_asks(tiny: SD3):
    calls: list[Any] = []
    hook = tiny.transformer.register_forward_hook(
        lambda _, __, given, answer: calls.append((given, answer[0])), with_kwargs=True
    )
    row = tiny.encode_prompts(["a cat"])
    pipe: Any = tiny.pipeline()
    generator = torch.Generator().manual_seed(0)
    try:
        pipe(
            prompt_embeds=row.tokens,
            pooled_prompt_embeds=row.pooled,
            num_inference_steps=2,
            guidance_scale=1.0,
            generator=generator,
            output_type="latent",
        )
    finally:
        hook.remove()
    assert len(calls) == 2
    for given, answer in calls:
        t = given["timestep"] / 1000
        assert 0 < float(t) <= 1
        assert torch.allclose(tiny.predict(given["hidden_states"], t, row), answer, atol=1e-5)


def test_the_noise_is_rectified_flow_with_the_schedulers_shift(tiny: SD3):
    assert tiny.noise == Flow(shift=3.0)


def test_facts_come_from_the_configuration(tiny: SD3):
    assert (tiny.latent.channels, tiny.latent.scale, tiny.latent.shift) == (16, 1.5, 0.0625)
    assert (tiny.resolution, tiny.bucket_step) == (32, 4)


def test_one_step_of_flow_towards_the_answer_is_the_scheduler_s_step(tiny: SD3):
    """Our noise law, our predict and their scheduler agree on what the network's answer means."""
    scheduler: Any = tiny.pipeline().components["scheduler"]
    scheduler.set_timesteps(1)
    noisy = torch.randn(1, 16, 16, 16)
    t = torch.tensor([float(scheduler.sigmas[0])])
    answer = tiny.predict(noisy, t, tiny.encode_prompts(["a cat"]))
    stepped = scheduler.step(answer, scheduler.timesteps[0], noisy, return_dict=False)[0]
    assert torch.allclose(tiny.noise.clean(noisy, answer, t), stepped, atol=1e-5)


def test_the_versions_differ_in_norms_and_second_attention():
    names = {version: set(SD3.tiny(version=version).denoiser.state_dict()) for version in ("3", "3.5")}
    more = names["3.5"] - names["3"]
    assert not names["3"] - names["3.5"]
    assert {name.split(".")[2] for name in more} == {"attn", "attn2"}
    assert "transformer_blocks.0.attn.norm_q.weight" in more


def test_added_words_do_not_move_the_place_where_prompts_are_pooled():
    base = SD3.tiny(t5=False)
    for name in ("text_encoder", "text_encoder_2"):
        tower: Any = base.towers[name]
        tower.config.eos_token_id = tower.text_model.eos_token_id = 2
    base = rebuilt(base)
    for name, words in base.tokenizers.items():
        tower = base.towers[name]
        words.add_tokens(["<acme>"])
        tower.resize_token_embeddings(len(words))
    wanted = []
    for name, words in base.tokenizers.items():
        tower = base.towers[name]
        ids = base.tokenize(name, ["a <acme> cat"])["input_ids"]
        end = ids[0].tolist().index(words.eos_token_id)
        wanted.append(tower.text_projection(tower(ids).last_hidden_state[:, end]))
    pooled = base.encode_prompts(["a <acme> cat"]).pooled
    assert torch.allclose(cast(Tensor, pooled), torch.cat(wanted, dim=-1), atol=1e-6)


def test_t5_may_be_left_out_of_the_folder_but_not_lost(tmp_path: Path):
    SD3.tiny().save(tmp_path / "base")
    shutil.rmtree(tmp_path / "base/text_encoder_3")
    shutil.rmtree(tmp_path / "base/tokenizer_3")
    with pytest.raises(LiveryError, match=r"text_encoder_3/config\.json is missing"):
        SD3.load(tmp_path / "base")
    index = tmp_path / "base/model_index.json"
    entries = json.loads(index.read_text())
    index.write_text(json.dumps({**entries, "text_encoder_3": [None, None], "tokenizer_3": [None, None]}))
    loaded = SD3.load(tmp_path / "base")
    assert set(loaded.towers) == {"text_encoder", "text_encoder_2"}
    assert loaded.pipeline().components["text_encoder_3"] is None
    for part in ("text_encoder_3", "tokenizer_3"):
        del entries[part]
    index.write_text(json.dumps(entries))
    assert SD3.load(tmp_path / "base").sha256 == loaded.sha256


def test_a_broken_folder_is_refused_with_one_sentence(tmp_path: Path):
    SD3.tiny().save(tmp_path / "base")
    (tmp_path / "base/tokenizer_3/tokenizer.json").unlink()
    with pytest.raises(LiveryError, match=r"tokenizer_3/tokenizer\.json is missing"):
        SD3.load(tmp_path / "base")
    shutil.rmtree(tmp_path / "base/transformer")
    with pytest.raises(LiveryError, match=r"transformer/config\.json is missing"):
        SD3.load(tmp_path / "base")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"in_channels": 33}, "takes 33 channels but the latents have 16"),
        ({"joint_attention_dim": 48}, "reads text 48 wide but text_encoder_3 gives 64"),
        ({"pooled_projection_dim": 48}, "reads text 48 wide but both CLIP encoders gives 40"),
    ],
)
def test_a_transformer_that_does_not_fit_is_refused(changes: dict[str, Any], told: str):
    base = SD3.tiny()
    transformer = SD3Transformer2DModel.from_config({**base.transformer.config, **changes})
    with pytest.raises(LiveryError, match=told):
        rebuilt(base, transformer=transformer)


def test_a_scheduler_of_diffusion_and_a_lost_tokenizer_are_refused():
    base = SD3.tiny()
    with pytest.raises(LiveryError, match="DDPMScheduler is not of rectified flow"):
        rebuilt(base, scheduler=DDPMScheduler())
    with pytest.raises(LiveryError, match="leave out both or none"):
        rebuilt(base, tokenizer_3=None)


def test_pictures_beyond_the_table_of_positions_are_refused():
    """32 x 32 patches of 2 x 2 latent cells of 2 x 2 pixels."""
    tiny = SD3.tiny(t5=False)
    words, t = tiny.encode_prompts(["a cat"]), torch.tensor([0.5])
    assert tiny.latent.factor == 2
    assert tiny.predict(torch.zeros(1, 16, 16, 64), t, words).shape == (1, 16, 16, 64)
    with pytest.raises(LiveryError, match=r"of 132 x 32 pixels are too large .* sides end at 128"):
        tiny.predict(torch.zeros(1, 16, 16, 66), t, words)
