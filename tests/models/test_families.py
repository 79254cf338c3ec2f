"""What every family promises, on every tiny model: the real classes with random weights."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.downsampling import Downsample2D
from torch import nn

from livery import plugins
from livery.models.parts import DiffusersBackbone
from livery.models.sd1 import SD1
from livery.models.sd3 import SD3
from livery.models.sdxl import SDXL
from livery.nouns import LiveryError

TINY: dict[str, Callable[[], DiffusersBackbone]] = {
    "sd1": SD1.tiny,
    "sd2": lambda: SD1.tiny(prediction="v_prediction"),
    "sdxl": SDXL.tiny,
    "sd3": lambda: SD3.tiny(version="3"),
    "sd3.5": SD3.tiny,
    "sd3.5 without t5": lambda: SD3.tiny(t5=False),
}


@pytest.fixture(scope="module", params=TINY)
def base(request: pytest.FixtureRequest) -> DiffusersBackbone:
    """For tests that leave it as it was."""
    return TINY[request.param]()


def towers_learn(base: DiffusersBackbone, learn: bool) -> None:
    for tower in base.towers.values():
        tower.requires_grad_(learn)


def test_every_family_is_here():
    assert {make().family for make in TINY.values()} == set(plugins.families())


def test_saved_and_loaded_is_the_same_model(base: DiffusersBackbone, tmp_path: Path):
    base.save(tmp_path / "base")
    loaded = type(base).load(tmp_path / "base")
    assert loaded.sha256 == base.sha256
    assert loaded.modules().keys() == base.modules().keys()
    for part, module in {"vae": base.vae, **base.modules()}.items():
        theirs = {"vae": loaded.vae, **loaded.modules()}[part].state_dict()
        assert module.state_dict().keys() == theirs.keys()
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in module.state_dict().items())
    ours, again = base.encode_prompts(["né 42!"]), loaded.encode_prompts(["né 42!"])
    for name, part in ours.tensors().items():
        # Weights read from a file lie elsewhere in memory, for which a product may round otherwise.
        assert torch.allclose(part, again.tensors()[name], atol=1e-6)


def test_equal_seeds_are_equal_models(base: DiffusersBackbone):
    assert type(base).tiny(0).sha256 == type(base).tiny(0).sha256 != type(base).tiny(1).sha256


def test_everything_rests_frozen(base: DiffusersBackbone):
    for module in (base.vae, *base.modules().values()):
        assert not module.training
        assert not any(param.requires_grad for param in module.parameters())


@pytest.mark.parametrize(("height", "width"), [(32, 32), (16, 48)])
def test_pictures_of_any_shape_come_back_as_pictures(base: DiffusersBackbone, height: int, width: int):
    pixels = torch.rand(2, 3, height, width) * 2 - 1
    latents = base.encode_images(pixels)
    spec = base.latent
    assert latents.shape == (2, spec.channels, height // spec.factor, width // spec.factor)
    vae: Any = base.vae
    mean = vae.encode(pixels).latent_dist.mean
    assert torch.allclose(latents, (mean - spec.shift) * spec.scale, atol=1e-6)
    decoded = base.decode_latents(latents)
    assert torch.allclose(decoded, vae.decode(mean).sample, atol=1e-4)
    t = base.noise.sample_timesteps(2)
    assert base.predict(latents, t, base.encode_prompts(["a cat", ""])).shape == latents.shape


def test_the_bucket_step_is_what_the_denoiser_halves(base: DiffusersBackbone):
    halved = sum(isinstance(module, Downsample2D) for module in base.denoiser.modules())
    patch = getattr(base.denoiser.config, "patch_size", None) or 1
    assert base.bucket_step == base.latent.factor * 2**halved * patch
    cells = base.bucket_step // base.latent.factor
    latents = torch.randn(1, base.latent.channels, cells, 3 * cells)
    row = base.encode_prompts(["a"])
    assert base.predict(latents, base.noise.sample_timesteps(1), row).shape == latents.shape


def test_targets_are_the_layers_that_attend_and_feed_forward(base: DiffusersBackbone):
    found = _matched(base.denoiser, base.lora_targets)
    assert all(isinstance(base.denoiser.get_submodule(name), nn.Linear) for name in found)
    every = [name for name, module in base.denoiser.named_modules() if isinstance(module, nn.Linear)]
    inside = [name for name in every if re.search(r"transformer_blocks\.\d+\.(attn|ff)", name)]
    assert found == inside != []
    for tower in base.towers.values():
        layers = [n for n, m in tower.named_modules() if isinstance(m, nn.Linear) and "projection" not in n]
        assert _matched(tower, base.tower_targets) == layers != []


def _matched(model: nn.Module, regex: str) -> list[str]:
    return [name for name, _ in model.named_modules() if re.fullmatch(regex, name)]


def test_gradients_reach_every_tower(base: DiffusersBackbone):
    towers_learn(base, True)
    try:
        rows = base.encode_prompts(["a red fox", "a cat"]).tensors()
        torch.stack([part.square().sum() for part in rows.values()]).sum().backward()
        for name, tower in base.towers.items():
            embedding: Any = tower.get_input_embeddings()  # type: ignore[operator]
            assert embedding.weight.grad.abs().sum() > 0, name
    finally:
        towers_learn(base, False)
        for tower in base.towers.values():
            tower.zero_grad()


def test_placeholders_are_replaced_before_tokenizing(base: DiffusersBackbone):
    plain = base.encode_prompts(["a red fox runs"]).tensors()
    base.placeholders.update({"<a>": "red", "<a>2": "red fox", "fox": "hen"})
    try:
        rows = base.encode_prompts(["a <a>2 runs"]).tensors()
    finally:
        base.placeholders.clear()
    assert all(torch.equal(part, plain[name]) for name, part in rows.items())


def test_a_tokenizer_put_in_place_is_used(base: DiffusersBackbone):
    prompts = ["a cat"]
    plain = base.encode_prompts(prompts).tensors()
    for tower, own in base.tokenizers.items():

        def reading_dog(texts: list[str], own: Any = own, **options: Any) -> Any:
            return own([text.replace("cat", "dog") for text in texts], **options)

        base.tokenizers[tower] = reading_dog
        try:
            changed = base.encode_prompts(prompts).tensors()
        finally:
            base.tokenizers[tower] = own
        assert not torch.equal(changed["tokens"], plain["tokens"]), tower


@pytest.mark.parametrize("forced", [True, False])
def test_an_autoencoder_unsafe_in_fp16_never_runs_in_it(base: DiffusersBackbone, forced: bool):
    vae: Any = base.vae
    before = bool(vae.config.force_upcast)
    vae.register_to_config(force_upcast=forced)
    try:
        latents = torch.randn(1, base.latent.channels, 8, 8)
        exact = base.decode_latents(latents)
        with torch.autocast("cpu", torch.float16):
            halved = base.decode_latents(latents)
            again = base.encode_images(exact)
        assert torch.equal(halved, exact) is forced
        assert torch.equal(again, base.encode_images(exact)) is forced
        assert halved.dtype == again.dtype == torch.float32
    finally:
        vae.register_to_config(force_upcast=before)


def test_half_weights_of_an_unsafe_autoencoder_are_widened(base: DiffusersBackbone):
    vae: Any = type(base).tiny().vae
    state = {name: tensor.half().float() for name, tensor in vae.state_dict().items()}
    pixels = torch.rand(1, 3, 16, 16)
    other = type(base).tiny()
    other.vae.half()
    latents = other.encode_images(pixels)
    vae.load_state_dict(state)
    mean = vae.encode(pixels).latent_dist.mean
    assert torch.allclose(latents, (mean - base.latent.shift) * base.latent.scale, atol=1e-6)


def test_pipelines_share_the_parts(base: DiffusersBackbone):
    for kind in base.pipeline_kinds:
        pipe: Any = base.pipeline(kind)
        parts = pipe.components
        assert parts[base.denoiser_part] is base.denoiser
        assert parts["vae"] is base.vae
        assert all(parts[name] is tower for name, tower in base.towers.items())
        assert parts["scheduler"] is not base.scheduler


def test_a_folder_of_another_family_is_called_by_its_name(base: DiffusersBackbone, tmp_path: Path):
    base.save(tmp_path / "base")
    for name in set(plugins.families()) - {base.family}:
        with pytest.raises(LiveryError, match=f"a {base.pipelines[0]} folder, not") as refusal:
            plugins.families()[name].load(tmp_path / "base")
        assert "\n" not in str(refusal.value)


def test_more_words_than_the_encoder_knows_are_refused(base: DiffusersBackbone):
    other = type(base).tiny()
    for tower, words in reversed(other.tokenizers.items()):
        known = len(words)
        words.add_tokens([f"word{number}" for number in range(9)])
        family: Any = type(base)
        with pytest.raises(LiveryError, match=rf"the tokenizer has {known + 9} words but {tower} knows"):
            family(**other.components())
