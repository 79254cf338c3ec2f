"""SD1 on its tiny model: the real classes with random weights. Says nothing about picture quality."""

import json
import shutil
import socket
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import nn

from livery.models.backbone import PipelineKind
from livery.models.noise import Diffusion, Velocity
from livery.models.sd1 import SD1
from livery.nouns import LiveryError


@pytest.fixture(scope="module")
def tiny() -> SD1:
    return SD1.tiny()


@pytest.fixture(scope="module")
def saved(tiny: SD1, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "tiny"
    tiny.save(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy that a test may break."""
    return Path(shutil.copytree(saved, tmp_path / "base"))


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_tiny_is_quick_and_leaves_the_global_seed_alone():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    start = time.process_time()
    SD1.tiny()
    assert time.process_time() - start < 2
    assert torch.equal(torch.rand(1), expected)


def test_facts_come_from_the_configuration(tiny: SD1, folder: Path):
    assert (tiny.latent.channels, tiny.latent.factor, tiny.latent.scale) == (4, 2, 0.5)
    assert (tiny.resolution, tiny.lengths["text_encoder"], cast(Diffusion, tiny.noise).timesteps) == (
        32,
        16,
        1000,
    )
    edit(folder / "vae/config.json", scaling_factor=0.25, shift_factor=0.125)
    edit(folder / "unet/config.json", sample_size=8)
    edit(folder / "tokenizer/tokenizer_config.json", model_max_length=9)
    edit(folder / "scheduler/scheduler_config.json", prediction_type="v_prediction", num_train_timesteps=50)
    other = SD1.load(folder)
    assert (other.latent.scale, other.latent.shift, other.resolution) == (0.25, 0.125, 16)
    assert (other.lengths["text_encoder"], cast(Diffusion, other.noise).timesteps) == (9, 50)
    assert type(other.noise).__name__ == "Velocity"
    assert other.sha256 != tiny.sha256


def test_a_tokenizer_in_the_older_two_files_is_the_same(tiny: SD1, folder: Path):
    """As SD 1.5's folder has it. The tiny tokenizer has no merges: that they act is not shown here."""
    (folder / "tokenizer/tokenizer.json").unlink()
    (folder / "tokenizer/vocab.json").write_text(json.dumps(tiny.tokenizers["text_encoder"].get_vocab()))
    (folder / "tokenizer/merges.txt").write_text("#version: 0.2\n")
    loaded = SD1.load(folder)
    assert loaded.sha256 == tiny.sha256
    prompts = ["Two red apples, noto style", "né 42!"]
    assert torch.equal(loaded.encode_prompts(prompts).tokens, tiny.encode_prompts(prompts).tokens)


def test_a_tokenizer_without_a_limit_takes_the_encoders(folder: Path):
    edit(folder / "tokenizer/tokenizer_config.json", model_max_length=10**30)
    assert SD1.load(folder).lengths["text_encoder"] == 16


def test_saved_and_loaded_is_the_same_model(tiny: SD1, saved: Path):
    loaded = SD1.load(saved)
    assert loaded.sha256 == tiny.sha256
    for part, module in tiny.modules().items():
        theirs = loaded.modules()[part].state_dict()
        assert module.state_dict().keys() == theirs.keys()
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in module.state_dict().items())


def test_save_never_writes_over_files(tiny: SD1, saved: Path):
    with pytest.raises(LiveryError, match="already holds files"):
        tiny.save(saved)


def test_nothing_reaches_for_the_network(saved: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: object) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    SD1.load(saved).pipeline()
    with pytest.raises(LiveryError, match="allow the network"):
        SD1.load("nobody/nothing")


def test_images_become_the_same_latents_each_time(tiny: SD1):
    pixels = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = tiny.encode_images(pixels)
    assert latents.shape == (2, 4, 16, 16)
    assert torch.equal(latents, tiny.encode_images(pixels))
    mean = cast(Any, tiny.vae).encode(pixels).latent_dist.mean
    assert torch.allclose(latents, mean * 0.5)
    decoded = tiny.decode_latents(latents)
    assert decoded.shape == pixels.shape
    assert torch.allclose(decoded, cast(Any, tiny.vae).decode(mean).sample, atol=1e-5)


def test_prompts_are_encoded_as_the_pipeline_encodes_them(tiny: SD1):
    prompts = ["a red fox", "", "many words " * 10]
    tokens = tiny.encode_prompts(prompts).tokens
    assert tokens.shape == (3, tiny.lengths["text_encoder"], 32)
    theirs = cast(Any, tiny.pipeline()).encode_prompt(prompts, "cpu", 1, False)[0]
    assert torch.equal(tokens, theirs)


def test_sizes_are_not_read(tiny: SD1):
    noisy, t, row = torch.randn(1, 4, 16, 16), torch.tensor([3]), tiny.encode_prompts(["a cat"])
    sized = replace(row, size=torch.tensor([[64, 64, 0, 0, 32, 32]]))
    assert torch.equal(tiny.predict(noisy, t, sized), tiny.predict(noisy, t, row))


def test_the_identity_of_a_base_stays_as_adapters_know_it():
    """Adapters out there name it: a change here makes them refuse their base."""
    base = SD1.tiny()
    for module in (base.vae, *base.modules().values()):
        for tensor in module.state_dict().values():
            tensor.fill_(1)  # random weights may differ between processors
    base = SD1(**base.components())
    assert base.sha256 == "c99679d147a62df49054b05a5f76191565bfb9f1ef3db909e720ea089d4f59da"


def test_the_layout_of_sd2_is_v_prediction_with_linear_projections():
    second = SD1.tiny(prediction="v_prediction")
    assert isinstance(second.noise, Velocity)
    assert isinstance(second.unet.get_submodule("down_blocks.0.attentions.0.proj_in"), nn.Linear)
    assert second.text_encoder.config.hidden_act == "gelu"
    assert second.sha256 != SD1.tiny().sha256


def test_predict_keeps_the_shape_and_works_under_autocast(tiny: SD1):
    noisy, t = torch.randn(2, 4, 16, 16), torch.tensor([3, 900])
    rows = tiny.encode_prompts(["a cat", ""])
    exact = tiny.predict(noisy, t, rows)
    with torch.autocast("cpu", torch.bfloat16):
        rough = tiny.predict(noisy, t, rows)
    assert exact.shape == noisy.shape
    assert exact.dtype == torch.float32
    assert torch.allclose(rough.float(), exact, atol=0.1)


def test_pipelines_share_the_components_and_draw(tiny: SD1):
    image = torch.rand(1, 3, 32, 32)
    common = {"num_inference_steps": 2, "output_type": "np"}
    inputs: dict[PipelineKind, dict[str, Any]] = {
        "text-to-image": {},
        "image-to-image": {"image": image, "strength": 0.9},
        "inpainting": {"image": image, "mask_image": torch.ones(1, 1, 32, 32), "height": 32, "width": 32},
    }
    for kind, more in inputs.items():
        pipe = cast(Any, tiny.pipeline(kind))
        assert pipe.unet is tiny.denoiser
        assert pipe.vae is tiny.vae
        assert pipe.text_encoder is tiny.towers["text_encoder"]
        generator = torch.Generator().manual_seed(0)
        assert pipe("a cat", generator=generator, **common, **more).images.shape == (1, 32, 32, 3)


def test_half_precision_files_load_as_float32(folder: Path, tiny: SD1):
    path = folder / "unet/diffusion_pytorch_model.safetensors"
    halves = {name: tensor.half() for name, tensor in load_file(path).items()}
    save_file(halves, path, {"format": "pt"})
    loaded = SD1.load(folder)
    assert {p.dtype for p in loaded.denoiser.parameters()} == {torch.float32}
    weight = loaded.denoiser.state_dict()["conv_in.weight"]
    assert torch.equal(weight, tiny.denoiser.state_dict()["conv_in.weight"].half().float())


def test_files_of_a_variant_are_found(folder: Path, tiny: SD1):
    for part in ("unet", "vae", "text_encoder"):
        path = next((folder / part).glob("*.safetensors"))
        path.rename(path.with_suffix(".fp16.safetensors"))
    assert SD1.load(folder).sha256 == tiny.sha256


def test_the_hash_sees_every_weight(tiny: SD1, folder: Path):
    assert SD1.tiny(0).sha256 == tiny.sha256
    assert SD1.tiny(1).sha256 != tiny.sha256
    path = folder / "vae/diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    tensors["decoder.conv_out.bias"][0] += 1
    save_file(tensors, path, {"format": "pt"})
    assert SD1.load(folder).sha256 != tiny.sha256


def test_everything_rests_frozen(tiny: SD1):
    for module in (tiny.vae, *tiny.modules().values()):
        assert not module.training
        assert not any(param.requires_grad for param in module.parameters())


# ------------------------------------------------------------------ refusals, one sentence each


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def pickled(folder: Path) -> None:
    (folder / "unet/diffusion_pytorch_model.safetensors").rename(folder / "unet/diffusion_pytorch_model.bin")


def truncated(folder: Path) -> None:
    path = folder / "vae/diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])


def without_a_weight(folder: Path) -> None:
    path = folder / "unet/diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    del tensors["conv_in.weight"]
    save_file(tensors, path, {"format": "pt"})


def without_a_word_weight(folder: Path) -> None:
    path = folder / "text_encoder/model.safetensors"
    tensors = load_file(path)
    del tensors[min(tensors)]
    save_file(tensors, path, {"format": "pt"})


BROKEN = {
    "model_index.json": (remove("model_index.json"), "no model_index.json"),
    "another family": (
        lambda f: edit(f / "model_index.json", _class_name="StableDiffusionXLPipeline"),
        "a StableDiffusionXLPipeline folder",
    ),
    "broken index": (lambda f: (f / "model_index.json").write_text("{"), "model_index.json: not valid JSON"),
    "no unet": (lambda f: shutil.rmtree(f / "unet"), "unet/config.json is missing"),
    "no tokenizer": (lambda f: shutil.rmtree(f / "tokenizer"), "tokenizer/tokenizer_config.json is missing"),
    "no scheduler": (lambda f: shutil.rmtree(f / "scheduler"), "scheduler_config.json is missing"),
    "no weights": (remove("vae/diffusion_pytorch_model.safetensors"), "model.safetensors is missing"),
    "a pickle": (pickled, "diffusion_pytorch_model.bin: a pickle"),
    "truncated": (truncated, "vae: cannot be read as AutoencoderKL"),
    "a weight missing": (without_a_weight, "unet: 1 weights are missing, first conv_in.weight"),
    "a text weight missing": (without_a_word_weight, "text_encoder: 1 weights are missing"),
    "weights of another text width": (
        lambda f: edit(f / "text_encoder/config.json", intermediate_size=48),
        "text_encoder: cannot be read as CLIPTextModel: its weights have other shapes than its config.json",
    ),
    "weights of another u-net": (
        lambda f: edit(f / "unet/config.json", cross_attention_dim=48),
        "unet: cannot be read as UNet2DConditionModel: its weights have other shapes",
    ),
    "strange scheduler": (
        lambda f: edit(f / "scheduler/scheduler_config.json", _class_name="Evil"),
        "scheduler 'Evil'",
    ),
    "no words": (remove("tokenizer/tokenizer.json"), "tokenizer/vocab.json and merges.txt are missing"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_folder_is_refused_with_one_sentence(name: str, folder: Path):
    damage, told = BROKEN[name]
    damage(folder)
    with pytest.raises(LiveryError) as refusal:
        SD1.load(folder)
    text = str(refusal.value)
    assert told in text
    assert str(folder) in text
    assert "\n" not in text


def test_words_that_the_encoder_does_not_know_are_refused(folder: Path):
    words = {f"word{number}": number for number in range(600)}
    (folder / "tokenizer/tokenizer.json").unlink()
    (folder / "tokenizer/vocab.json").write_text(json.dumps(words))
    (folder / "tokenizer/merges.txt").write_text("#version: 0.2\n")
    with pytest.raises(LiveryError, match=r"the tokenizer has 60\d words but text_encoder knows 514"):
        SD1.load(folder)


def test_an_inpainting_unet_is_refused(tiny: SD1):
    config = {**tiny.unet.config, "in_channels": 9}
    unet = cast(UNet2DConditionModel, UNet2DConditionModel.from_config(config))
    with pytest.raises(LiveryError, match="takes 9 channels but the latents have 4"):
        SD1(unet, cast(Any, tiny.vae), tiny.text_encoder, tiny.tokenizers["text_encoder"], tiny.scheduler)
