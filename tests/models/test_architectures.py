"""Full-size shapes without weights, against known counts; random weights in tiny shapes."""

import inspect
import json
from dataclasses import replace
from typing import Any

import diffusers
import pytest
import torch
from torch import nn

from livery import plugins
from livery.models import architectures
from livery.models.architectures import NAMES, Architecture, architecture, count, meta_parts
from livery.models.sd1 import SD1
from livery.nouns import LiveryError

# The U-Nets' and CLIP-L's counts are the published ones. The others are what the configurations build, held
# fast here; publications round them (SD3 medium 2 B; SD3.5's 2.5 B and 8 B count fixed positions too).
COUNTS = {
    ("sd1.5", "denoiser"): 859_520_964,
    ("sd1.5", "text_encoder"): 123_060_480,
    ("sd1.5", "vae"): 83_653_863,
    ("sd2.1", "denoiser"): 865_910_724,
    ("sd2.1", "text_encoder"): 340_387_840,
    ("sd2.1-base", "denoiser"): 865_910_724,
    ("sdxl", "denoiser"): 2_567_463_684,
    ("sdxl", "text_encoder"): 123_060_480,
    ("sdxl", "text_encoder_2"): 694_659_840,
    ("sdxl", "vae"): 83_653_863,
    ("sd3-medium", "denoiser"): 2_028_328_000,
    ("sd3-medium", "text_encoder"): 123_650_304,
    ("sd3-medium", "text_encoder_2"): 694_659_840,
    ("sd3-medium", "text_encoder_3"): 4_762_310_656,
    ("sd3-medium", "vae"): 83_819_683,
    ("sd3.5-medium", "denoiser"): 2_243_171_520,
    ("sd3.5-large", "denoiser"): 8_056_627_520,
}


@pytest.mark.parametrize("name", NAMES)
def test_parameter_counts_are_the_known_ones(name: str):
    parts = meta_parts(name)
    known = {part: number for (which, part), number in COUNTS.items() if which == name}
    assert known
    assert {part: count(parts[part]) for part in known} == known


@pytest.mark.parametrize("name", NAMES)
def test_nothing_of_a_full_size_model_takes_memory(name: str):
    for part in meta_parts(name).values():
        tensors = [*part.parameters(), *part.buffers()]
        assert tensors
        assert {tensor.device.type for tensor in tensors} == {"meta"}


def test_no_key_of_a_configuration_is_unknown_to_its_class():
    """diffusers drops unknown keys in silence, so a misspelt one would build another model."""
    seen = 0
    for config in (config for name in NAMES for config in architecture(name).parts.values()):
        name = config["_class_name"]
        kind = architectures.CLASSES.get(name) or getattr(diffusers, name, None)
        if kind is None:
            continue
        known = inspect.signature(getattr(kind, "config_class", None) or kind).parameters
        assert {key for key in config if not key.startswith("_")} <= set(known)
        seen += 1
    assert seen == 3 * 4 + 5 + 3 * 6  # every part but the tokenizers


def test_the_parts_fit_together():
    for name in NAMES:
        parts = architecture(name).parts
        denoiser = parts.get("unet") or parts["transformer"]
        assert denoiser["in_channels"] == parts["vae"]["latent_channels"]
        widths = [
            parts[tower]["hidden_size"] for tower in ("text_encoder", "text_encoder_2") if tower in parts
        ]
        read = denoiser.get("cross_attention_dim") or parts["text_encoder_3"]["d_model"]
        assert read == (denoiser.get("joint_attention_dim") or sum(widths))


def test_an_unknown_name_is_refused_with_the_nearest():
    with pytest.raises(LiveryError, match=r"did you mean 'sd3\.5-large'"):
        architecture("sd35-large")


def test_a_configuration_names_no_class_of_a_strangers_choice():
    with pytest.raises(LiveryError, match="unet is of the class Popen; not one livery reads"):
        architectures.build({"_class_name": "Popen", "args": "true"}, "unet")
    with pytest.raises(LiveryError, match="scheduler is of the class os; not one livery reads"):
        architectures.build_other({"_class_name": "os"}, "scheduler")
    with pytest.raises(LiveryError, match="the configuration of vae does not fit its class"):
        architectures.build({"_class_name": "AutoencoderKL", "down_block_types": ["Nothing"]}, "vae")


def test_families():
    assert architectures.of_family("sd1") == ("sd1.5", "sd2.1", "sd2.1-base")
    assert architectures.of_family("sdxl") == ("sdxl",)
    assert "sd3-medium" in architectures.of_family("sd3")
    assert architectures.of_family("none") == ()


def tiny() -> Architecture:
    """SD1's tiny shapes with CLIP's vocabulary, as an architecture."""
    components = SD1.tiny().pipeline().components
    parts = {part: dict(architecture("sd1.5").parts[part]) for part in ("tokenizer", "scheduler")}
    for part in ("unet", "vae", "text_encoder"):
        module: Any = components[part]
        config = module.config.to_dict() if hasattr(module.config, "to_dict") else dict(module.config)
        parts[part] = {**json.loads(json.dumps(config)), "_class_name": type(module).__name__}
    parts["text_encoder"] |= {"vocab_size": 49408, "max_position_embeddings": 77}
    return replace(architecture("sd1.5"), title="tiny", parts=parts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_random_weights_of_true_shapes(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype):
    monkeypatch.setattr(architectures, "architecture", lambda _: tiny())
    one, two = (architectures.random_backbone("tiny", dtype=dtype, seed=seed) for seed in (0, 1))
    assert one.family == "sd1"
    assert one.sha256 != two.sha256
    assert one.sha256 == architectures.random_backbone("tiny", dtype=dtype, seed=0).sha256
    weights = [parameter for module in one.modules().values() for parameter in module.parameters()]
    assert {(p.dtype, p.device.type, p.requires_grad) for p in weights} == {(dtype, "cpu", False)}
    conditioning = one.encode_prompts(["a photo of a cat"])
    assert conditioning.tokens.shape == (1, 77, 32)
    noisy = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    tokens = replace(conditioning, tokens=conditioning.tokens.repeat(2, 1, 1))
    guess = one.predict(noisy, torch.tensor([1, 900]), tokens)
    assert guess.isfinite().all()
    assert 0.01 < guess.float().std() < 100


def test_shared_weights_stay_shared():
    config = {
        "_class_name": "T5EncoderModel",
        "d_model": 16,
        "d_kv": 4,
        "d_ff": 8,
        "num_layers": 1,
        "num_heads": 2,
        "vocab_size": 30,
        "feed_forward_proj": "gated-gelu",
    }
    with architectures.empty_weights():
        module = architectures.build(config, "text_encoder_3")
    filled: Any = architectures._fill(  # pyright: ignore[reportPrivateUsage]
        module, torch.device("cpu"), torch.float32, torch.Generator().manual_seed(0)
    )
    assert filled.shared.weight.data_ptr() == filled.encoder.embed_tokens.weight.data_ptr()
    assert isinstance(filled.encoder.block, nn.ModuleList)


def test_every_family_here_has_an_architecture():
    for family in plugins.families():
        assert architectures.of_family(family)
