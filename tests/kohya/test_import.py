"""kohya's configurations become recipes that train the same, and nothing goes missing in silence."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from torch import nn
from typer.testing import CliRunner

from livery import cli, plugins
from livery.kohya import Imported, import_recipe
from livery.kohya.network import ATTENTION, OUTER, RESNETS, WIDE
from livery.kohya.settings import read_settings
from livery.kohya.tables import USUAL
from livery.nouns import FullSpec, LiveryError, LowRankSpec, Recipe, TokensSpec, read_recipe
from livery.tuners.tuner import build

SD_SCRIPTS = """
[model]
pretrained_model_name_or_path = "models/sd15.safetensors"
[network]
network_module = "networks.lora"
network_dim = 32
network_alpha = 16
network_args = ["conv_dim=8", "conv_alpha=4"]
text_encoder_lr = 5e-5
unet_lr = 1e-4
[training]
optimizer_type = "AdamW8bit"
optimizer_args = ["weight_decay=0.05", "betas=0.9,0.98", "eps=1e-7"]
lr_scheduler = "cosine_with_restarts"
lr_scheduler_num_cycles = 2
lr_warmup_steps = 0.1
max_train_steps = 2000
train_batch_size = 2
gradient_accumulation_steps = 4
max_grad_norm = 0.5
mixed_precision = "fp16"
seed = 7
save_every_n_steps = 250
resolution = "512,768"
enable_bucket = true
bucket_reso_steps = 32
min_bucket_reso = 256
max_bucket_reso = 1280
bucket_no_upscale = true
shuffle_caption = true
keep_tokens = 2
caption_dropout_rate = 0.05
caption_tag_dropout_rate = 0.2
flip_aug = true
masked_loss = true
noise_offset = 0.05
ip_noise_gamma = 0.1
min_snr_gamma = 5
loss_type = "huber"
huber_c = 0.2
clip_skip = 2
output_dir = "out"
xformers = true
made_up = 3
color_aug = false
"""
# As the GUI saves a preset: everything, strings for numbers, empty for what is not set.
GUI: dict[str, Any] = {
    "LoRA_type": "Standard",
    "additional_parameters": "--max_grad_norm=0.5 --caption_suffix ', acme style'",
    "bucket_no_upscale": True,
    "bucket_reso_steps": 64,
    "conv_alpha": 32,
    "conv_dim": 32,
    "enable_bucket": True,
    "epoch": 160,
    "factor": -1,
    "gradient_accumulation_steps": 1.0,
    "gradient_checkpointing": True,
    "keep_tokens": "0",
    "learning_rate": 0.0001,
    "lr_scheduler": "constant",
    "lr_warmup": 10,
    "max_resolution": "1024,1024",
    "max_timestep": 900,
    "max_token_length": "75",
    "max_train_epochs": "",
    "max_train_steps": "320",
    "min_snr_gamma": 0,
    "mixed_precision": "bf16",
    "multires_noise_discount": 0.1,
    "multires_noise_iterations": 6,
    "network_alpha": 1,
    "network_dim": 32,
    "noise_offset": 0.0375,
    "noise_offset_type": "Multires",
    "optimizer": "Prodigy",
    "optimizer_args": '"d_coef=2.0" "weight_decay=0.4" "use_bias_correction=True"',
    "sdxl": True,
    "seed": "12345",
    "text_encoder_lr": 0.5,
    "train_batch_size": 4,
    "unet_lr": 1.0,
    "v2": False,
}


def found_path(folder: Path, content: str | dict[str, Any]) -> Path:
    return folder / ("k.json" if isinstance(content, dict) else "k.toml")


def imported(folder: Path, content: str | dict[str, Any], **options: Any) -> Imported:
    path = found_path(folder, content)
    path.write_text(json.dumps(content) if isinstance(content, dict) else content)
    return import_recipe(path, **options)


def row(found: Imported, key: str) -> tuple[str, str, str]:
    rows = [each for each in found.keys if each.key == key]
    assert len(rows) == 1, f"{key} has {len(rows)} lines"
    return rows[0].became, rows[0].ours, rows[0].why


def lora(found: Imported) -> LowRankSpec:
    (spec,) = found.recipe.tuners
    assert isinstance(spec, LowRankSpec)
    return spec


def test_a_configuration_of_sd_scripts(tmp_path: Path) -> None:
    found = imported(tmp_path, SD_SCRIPTS)
    recipe, spec = found.recipe, lora(found)
    assert (recipe.base, recipe.family) == ("models/sd15.safetensors", "sd1")
    assert (recipe.steps, recipe.batch_size, recipe.accumulate) == (2000, 2, 4)
    assert (recipe.learning_rate, recipe.precision, recipe.seed) == (1e-4, "fp16", 7)
    assert recipe.checkpoint_every == 250
    assert (spec.rank, spec.alpha, spec.towers) == (32, 16, {"text_encoder": 5e-5})
    assert (spec.ranks, spec.alphas) == ({WIDE: 8}, {WIDE: 4})
    section = recipe.optimizer
    assert (section.kind, section.weight_decay, section.betas) == ("adamw8bit", 0.05, (0.9, 0.98))
    assert (section.schedule, section.restarts, section.warmup_steps) == ("cosine-restarts", 2, 200)
    assert section.clip_norm == 0.5
    pictures = recipe.pictures
    assert (pictures.resolutions, pictures.bucket_step, pictures.upscale) == ((640,), 32, False)
    assert pictures.max_ratio == pytest.approx(512 * 768 / (512 * 768 / 1280) ** 2, abs=1e-3)
    assert (pictures.flip, pictures.masks) == (0.5, "loss")
    captions = recipe.captions
    assert (captions.shuffle_tags, captions.keep_tags) == (True, 2)
    assert (captions.dropout, captions.tag_dropout) == (0.05, 0.2)
    assert (recipe.noise.offset, recipe.noise.input_perturbation) == (0.05, 0.1)
    assert (recipe.loss.weighting, recipe.loss.min_snr_gamma) == ("min-snr", 5)
    assert (recipe.loss.kind, recipe.loss.huber_delta) == ("huber", 0.2)
    assert recipe.stop.keep == "last", "kohya keeps the last"


@pytest.mark.parametrize("content", [SD_SCRIPTS, GUI], ids=["sd-scripts", "the GUI"])
def test_every_key_has_one_line_or_is_counted_as_off(tmp_path: Path, content: str | dict[str, Any]) -> None:
    found = imported(tmp_path, content)
    named = [each.key for each in found.keys]
    assert len(named) == len(set(named))
    settings = read_settings(found_path(tmp_path, content))
    arguments = [f"optimizer_args.{key}" for key in settings.optimizer_args]
    arguments += [f"network_args.{key}" for key in settings.network_args]
    silent = {*settings.values, *arguments} - set(named)
    assert len(silent) == found.idle
    assert {key for key in silent if settings.has(key)} <= set(USUAL), "these mean what livery does anyway"


def test_what_is_dropped_says_why(tmp_path: Path) -> None:
    found = imported(tmp_path, SD_SCRIPTS)
    for key in ("clip_skip", "output_dir", "xformers", "made_up", "optimizer_args.eps"):
        became, _, why = row(found, key)
        assert became == "dropped"
        assert why
    assert row(found, "made_up")[2] == "livery has nothing like it"
    assert row(found, "resolution")[0] == "changed"
    assert row(found, "loss_type")[0] == "changed"


def test_a_preset_of_the_gui(tmp_path: Path) -> None:
    found = imported(tmp_path, GUI)
    recipe, spec = found.recipe, lora(found)
    assert (recipe.family, recipe.steps, recipe.steps_per_photo) == ("sdxl", 320, None)
    assert spec.targets == ATTENTION, "conv_dim counts for 'Kohya LoCon' alone"
    assert (spec.rank, spec.alpha, recipe.learning_rate) == (32, 1, 1.0)
    assert spec.towers == {"text_encoder": 0.5, "text_encoder_2": 0.5}
    assert (recipe.noise.pyramid, recipe.noise.offset) == (0.1, 0)
    assert recipe.loss.weighting == "none"
    assert (recipe.optimizer.kind, recipe.optimizer.weight_decay) == ("prodigy", 0.4)
    assert recipe.optimizer.clip_norm == 0.5
    assert recipe.optimizer.warmup_steps == 0, "kohya's constant does not warm up"
    assert row(found, "lr_warmup")[0] == "dropped"
    assert (recipe.trigger, recipe.captions.trigger_place) == ("acme style", "last")
    assert (recipe.memory.mode, recipe.memory.weights, recipe.memory.checkpointing) == (
        "manual",
        "bf16",
        True,
    )
    assert row(found, "max_timestep")[0] == "dropped"
    assert recipe.warnings() == ()


# ----------------------------------------------------------------------------- learning rates


def test_alpha_is_kept_and_the_table_says_what_the_rate_would_be_without(tmp_path: Path) -> None:
    found = imported(tmp_path, SD_SCRIPTS)
    assert row(found, "unet_lr") == (
        "taken",
        "learning_rate = 0.0001",
        "alpha / rank = 0.5 is kept; at alpha = rank the rate would be 5e-05",
    )


def test_on_request_alpha_goes_into_the_rates(tmp_path: Path) -> None:
    found = imported(tmp_path, SD_SCRIPTS.replace("conv_alpha=4", "conv_alpha=1"), alpha_as_rank=True)
    spec = lora(found)
    assert spec.alpha is None
    assert found.recipe.learning_rate == 1e-4 * 16 / 32
    assert spec.towers == {"text_encoder": 5e-5 * 16 / 32}
    before, after = 1 / 8 * 1e-4, spec.alphas[WIDE] / 8 * found.recipe.learning_rate
    assert after == pytest.approx(before), "the convolutions' own scale survives"
    assert row(found, "unet_lr")[0] == "changed"
    plain = lora(imported(tmp_path, SD_SCRIPTS, alpha_as_rank=True))
    assert plain.alphas == {}, "their scale was that of the others"


def test_prodigys_rate_is_never_scaled(tmp_path: Path) -> None:
    assert imported(tmp_path, GUI, alpha_as_rank=True).recipe.learning_rate == 1.0


def test_kohyas_defaults_are_not_liverys(tmp_path: Path) -> None:
    found = imported(tmp_path, 'network_module = "networks.lora"\nlearning_rate = 1e-4')
    recipe, spec = found.recipe, lora(found)
    assert (spec.rank, spec.alpha) == (4, 1)
    assert spec.towers == {"text_encoder": 1e-4}, "kohya trains the text encoder unless told not to"
    assert (recipe.steps, recipe.batch_size, recipe.precision) == (1600, 1, "fp32")
    assert (recipe.optimizer.schedule, recipe.optimizer.warmup_steps) == ("constant", 0)
    assert (recipe.captions.dropout, recipe.loss.weighting, recipe.pictures.buckets) == (0, "none", False)


@pytest.mark.parametrize(
    "line",
    ["network_train_unet_only = true", "text_encoder_lr = 0", "cache_text_encoder_outputs = true"],
)
def test_ways_to_leave_the_text_encoders_alone(tmp_path: Path, line: str) -> None:
    assert lora(imported(tmp_path, f"network_dim = 8\nlearning_rate = 1e-4\n{line}")).towers == {}


def test_two_rates_for_two_text_encoders(tmp_path: Path) -> None:
    text = "network_dim = 8\nunet_lr = 1e-4\ntext_encoder_lr = [1e-5, 2e-5]"
    assert lora(imported(tmp_path, text, family="sdxl")).towers == {
        "text_encoder": 1e-5,
        "text_encoder_2": 2e-5,
    }


# ----------------------------------------------------------------------------- layers


def by_kohyas_rule(unet: nn.Module, containers: tuple[str, ...]) -> set[str]:
    """Every linear layer and convolution inside a module of these classes: networks/lora.py."""
    found: set[str] = set()
    for name, module in unet.named_modules():
        if type(module).__name__ in containers:
            inner = module.named_modules()
            found |= {f"{name}.{each}" for each, layer in inner if isinstance(layer, nn.Linear | nn.Conv2d)}
    return found


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_the_layers_are_those_that_kohya_adapts(family: str, tmp_path: Path) -> None:
    if family not in plugins.families():
        pytest.skip(f"{family} is not registered")
    unet = plugins.families()[family].tiny().denoiser
    attention = ("Transformer2DModel",)
    resnets = ("ResnetBlock2D", "Downsample2D", "Upsample2D")
    text = 'network_module = "networks.lora"\nlearning_rate = 1e-4\nnetwork_dim = 8\nnetwork_alpha = 8\n'
    plain = lora(imported(tmp_path, text, family=family))
    wide = lora(imported(tmp_path, text + 'network_args = ["conv_dim=4"]', family=family))
    assert matched(unet, plain.targets) == by_kohyas_rule(unet, attention)
    assert matched(unet, wide.targets) == by_kohyas_rule(unet, attention + resnets)
    large = {
        name
        for name in by_kohyas_rule(unet, resnets)
        if isinstance(layer := unet.get_submodule(name), nn.Conv2d) and layer.kernel_size == (3, 3)
    }
    assert matched(unet, next(iter(wide.ranks))) & by_kohyas_rule(unet, resnets) == large


def test_what_is_imported_attaches_with_kohyas_ranks(tmp_path: Path) -> None:
    spec = lora(imported(tmp_path, SD_SCRIPTS))
    attached = build(spec).attach(plugins.families()["sd1"].tiny())
    ranks = {name: len(param) for name, param in attached.params.items() if name.endswith("lora_A.weight")}
    assert {name.partition(".")[0] for name in ranks} == {"denoiser", "text_encoder"}
    for name, rank in ranks.items():
        wide = re.search(r"\.(conv1|conv2|(down|up)samplers\.\d\.conv)\.lora_A", name)
        assert rank == (8 if wide else 32), name
    assert set(ranks.values()) == {8, 32}


def matched(unet: nn.Module, pattern: str | None) -> set[str]:
    assert pattern
    layers = (name for name, each in unet.named_modules() if isinstance(each, nn.Linear | nn.Conv2d))
    return {name for name in layers if re.fullmatch(pattern, name)}


@pytest.mark.parametrize(
    ("algo", "kind", "became"),
    [
        ("locon", "lora", "taken"),
        ("loha", "loha", "taken"),
        ("lokr", "lokr", "taken"),
        ("diag-oft", "oft", "changed"),
        ("ia3", "lora", "changed"),
    ],
)
def test_lycoris_algorithms(tmp_path: Path, algo: str, kind: str, became: str) -> None:
    text = (
        f'network_module = "lycoris.kohya"\nunet_lr = 1e-4\nnetwork_dim = 8\nnetwork_args = ["algo={algo}"]'
    )
    found = imported(tmp_path, text)
    assert lora(found).kind == kind
    assert row(found, "network_args.algo")[0] == became
    assert lora(found).targets == f"{ATTENTION}|{RESNETS}|{OUTER}", "LyCORIS' preset is full"


def test_a_whole_lokr_has_no_scale(tmp_path: Path) -> None:
    content = {
        "LoRA_type": "LyCORIS/LoKr",
        "network_dim": 100000,
        "network_alpha": 1,
        "factor": 6,
        "epoch": 150,
        "conv_dim": 100000,
        "conv_alpha": 1,
        "unet_lr": 1.0,
        "learning_rate": 1.0,
        "train_batch_size": 2,
    }
    found = imported(tmp_path, content)
    spec = lora(found)
    assert (spec.kind, spec.rank, spec.alpha, spec.factor) == ("lokr", 100000, 100000, 6)
    assert (spec.ranks, spec.alphas) == ({}, {})
    assert found.recipe.steps_per_photo == 75, "150 epochs of batches of 2"
    assert row(found, "max_train_epochs")[0] == "changed", "nobody said how often pictures repeat"


def test_dora_and_dropout(tmp_path: Path) -> None:
    text = 'network_module = "lycoris.kohya"\nunet_lr = 1e-4\nnetwork_dropout = 0.1\nfp8_base = true\n'
    found = imported(tmp_path, text + 'network_args = ["algo=locon", "dora_wd=True", "train_norm=True"]')
    assert (lora(found).dora, lora(found).dropout) == (True, 0.1)
    assert row(found, "network_args.train_norm")[0] == "dropped"
    assert row(found, "fp8_base")[0] == "dropped", "DoRA needs the weights whole"


# ----------------------------------------------------------------------------- other methods, other families


def test_without_a_network_the_weights_train(tmp_path: Path) -> None:
    text = """
        pretrained_model_name_or_path = "sdxl.safetensors"
        learning_rate = 4e-7
        learning_rate_te1 = 2e-7
        train_text_encoder = true
        optimizer_type = "Adafactor"
        optimizer_args = ["scale_parameter=False", "relative_step=False"]
        full_bf16 = true
        fused_backward_pass = true
        """
    found = imported(tmp_path, text)
    recipe = found.recipe
    (spec,) = recipe.tuners
    assert isinstance(spec, FullSpec)
    assert (recipe.family, recipe.learning_rate) == ("sdxl", 4e-7)
    assert spec.towers == {"text_encoder": 2e-7, "text_encoder_2": 4e-7}
    assert (recipe.memory.weights, recipe.memory.fused_backward) == ("fp32", True)
    assert row(found, "full_bf16")[0] == "dropped"


def test_a_fine_tune_of_the_gui(tmp_path: Path) -> None:
    content = {
        "sdxl_checkbox": True,
        "create_buckets": True,
        "max_resolution": "1024,1024",
        "prior_loss_weight": 1,
        "learning_rate": 5e-6,
        "learning_rate_te1": 1e-5,
        "learning_rate_te2": 0,
        "huber_c": 0.1,
        "optimizer": "PagedAdamW8bit",
        "optimizer_args": "weight_decay=0.1 betas=.9,.95",
        "epoch": 8,
        "gradient_accumulation_steps": 6.0,
        "train_batch_size": 2,
        "full_bf16": True,
        "loss_type": "l2",
    }
    found = imported(tmp_path, content)
    recipe = found.recipe
    assert recipe.tuners == (FullSpec(towers={"text_encoder": 1e-5}),)
    assert (recipe.family, recipe.pictures.buckets, recipe.accumulate) == ("sdxl", True, 6)
    assert (recipe.optimizer.kind, recipe.optimizer.betas) == ("adamw8bit", (0.9, 0.95))
    assert row(found, "optimizer_type")[0] == "changed", "without paging"
    assert row(found, "huber_c")[2] == "loss_type is not huber"
    cached = imported(tmp_path, {**content, "sdxl_cache_text_encoder_outputs": True}).recipe
    assert cached.tuners == (FullSpec(),)


def test_textual_inversion(tmp_path: Path) -> None:
    text = 'token_string = "<acme>"\ninit_word = "red shoe"\nnum_vectors_per_token = 4\nlearning_rate = 5e-4'
    recipe = imported(tmp_path, text).recipe
    assert recipe.tuners == (TokensSpec(tokens={"<acme>": "red shoe"}, vectors=4),)
    assert recipe.trigger == "<acme>"


def test_sd3_draws_levels_as_kohya_does(tmp_path: Path) -> None:
    text = 'network_module = "networks.lora_sd3"\nnetwork_dim = 4\nlearning_rate = 1e-4\nmin_snr_gamma = 5\n'
    recipe = imported(tmp_path, text).recipe
    assert recipe.family == "sd3"
    assert (recipe.noise.timesteps, recipe.noise.shift, recipe.loss.weighting) == ("uniform", 1.0, "none")
    normal = imported(
        tmp_path, text + 'weighting_scheme = "logit_normal"\nlogit_std = 0.5\ntraining_shift = 3.0'
    )
    noise = normal.recipe.noise
    assert (noise.timesteps, noise.logit_std, noise.shift) == ("logit-normal", 0.5, 3.0)


def test_datasets_and_class_photos(tmp_path: Path) -> None:
    (tmp_path / "data.toml").write_text(
        """
        [general]
        shuffle_caption = true
        keep_tokens = 1
        [[datasets]]
        resolution = 768
        batch_size = 3
        enable_bucket = true
        [[datasets.subsets]]
        image_dir = "a"
        num_repeats = 6
        [[datasets.subsets]]
        image_dir = "b"
        is_reg = true
        class_tokens = "a dog"
        """
    )
    text = 'dataset_config = "data.toml"\nnetwork_dim = 4\nunet_lr = 1e-4\nmax_train_epochs = 2\n'
    found = imported(tmp_path, text + "prior_loss_weight = 0.5")
    recipe = found.recipe
    assert (recipe.batch_size, recipe.pictures.resolutions, recipe.pictures.buckets) == (3, (768,), True)
    assert recipe.captions.shuffle_tags
    assert recipe.steps_per_photo == 4, "2 epochs x 6 repeats / 3 a batch"
    assert recipe.fitted(100).steps == 400
    assert (recipe.prior.kind, recipe.prior.prompt, recipe.prior.weight) == ("photos", "a dog", 0.5)


def test_repeats_are_read_from_folders_that_are_there(tmp_path: Path) -> None:
    (tmp_path / "train" / "12_acme shoe").mkdir(parents=True)
    (tmp_path / "reg" / "1_shoe").mkdir(parents=True)
    text = f"""
        train_data_dir = "{tmp_path / "train"}"
        reg_data_dir = "{tmp_path / "reg"}"
        network_dim = 4
        unet_lr = 1e-4
        max_train_epochs = 3
        sample_prompts = "prompts.txt"
        sample_every_n_steps = 50
        """
    (tmp_path / "prompts.txt").write_text("# comment\na shoe --n blurry --w 512\n\na red shoe\n")
    recipe = imported(tmp_path, text).recipe
    assert recipe.steps_per_photo == 36
    assert recipe.prior.prompt == "shoe"
    assert (recipe.sample_prompts, recipe.sample_every) == (("a shoe", "a red shoe"), 50)


# ----------------------------------------------------------------------------- what cannot be read


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("x = ", "cannot be read as a kohya configuration"),
        ("x = 1", "neither learning_rate nor network_module"),
        ('learning_rate = "fast"', "learning_rate = 'fast' is not a number"),
        ('learning_rate = 1e-4\npretrained_model_name_or_path = "flux1-dev"', "not a Stable Diffusion"),
        ("learning_rate = 1e-4\ncaption_dropout_rate = 7", "captions.dropout: Input should be less than"),
    ],
)
def test_what_cannot_be_read_is_one_sentence(tmp_path: Path, content: str, sentence: str) -> None:
    with pytest.raises(LiveryError, match=r"k\.toml") as caught:
        imported(tmp_path, content)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_command_writes_a_recipe_and_shows_the_table(tmp_path: Path) -> None:
    (tmp_path / "k.toml").write_text(SD_SCRIPTS)
    arguments = ["import-recipe", str(tmp_path / "k.toml"), "-o", str(tmp_path / "r.toml")]
    result = CliRunner().invoke(cli.app, arguments, env={"COLUMNS": "200"})
    assert result.exit_code == 0
    assert "made_up" in result.stdout
    assert read_recipe(tmp_path / "r.toml") == import_recipe(tmp_path / "k.toml").recipe
    again = CliRunner().invoke(cli.app, arguments)
    assert "is there already" in str(again.exception)
    listed = CliRunner().invoke(cli.app, [*arguments[:3], str(tmp_path / "s.toml"), "--json"])
    body = json.loads(listed.stdout)
    assert Recipe.model_validate(body["recipe"]) == read_recipe(tmp_path / "s.toml")
