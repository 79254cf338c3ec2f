"""Single-file checkpoints: every tiny family there and back, and what is said of files that do not fit."""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor

from livery.models import architectures, part_config, recognition, tiny
from livery.models.architectures import NAMES, Architecture, architecture
from livery.models.backbone import Backbone
from livery.models.clip_vocabulary import clip_tokenizer
from livery.models.layouts import LAYOUTS
from livery.models.load import load_backbone
from livery.models.sd1 import SD1
from livery.models.sd3 import SD3
from livery.models.sdxl import SDXL
from livery.models.single_file import load_single_file, save_single_file
from livery.models.weights_file import Header, Stored
from livery.nouns import LiveryError

TINY: Mapping[str, Callable[[], Backbone]] = {
    "sd1": SD1.tiny,
    "sd2": lambda: SD1.tiny(prediction="v_prediction"),
    "sdxl": SDXL.tiny,
    "sd3": lambda: SD3.tiny(version="3"),
    "sd3.5": SD3.tiny,
    "sd3.5 without T5": lambda: SD3.tiny(t5=False),
}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Backbone, Path]]:
    """Every tiny family and the file that was written of it."""
    folder, found = tmp_path_factory.mktemp("files"), {}
    for name, make in TINY.items():
        backbone, path = make(), folder / f"{name}.safetensors"
        save_single_file(backbone, path)
        found[name] = (backbone, path)
    return found


def weights(backbone: Backbone) -> dict[str, Tensor]:
    parts = {"vae": backbone.vae, **backbone.modules()}
    return {f"{part}.{name}": t for part, module in parts.items() for name, t in module.state_dict().items()}


def tensors_of(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safetensors.safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118


# ------------------------------------------------------------------ there and back


@pytest.mark.parametrize("name", TINY)
def test_every_family_comes_back_the_same(written: dict[str, tuple[Backbone, Path]], name: str):
    backbone, path = written[name]
    again = load_backbone(str(path))
    assert type(again) is type(backbone)
    assert again.notes == ()
    before, after = weights(backbone), weights(again)
    assert set(after) == set(before)
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert again.sha256 == backbone.sha256
    assert (again.latent, again.resolution, again.bucket_step) == (
        backbone.latent,
        backbone.resolution,
        backbone.bucket_step,
    )
    prompts = ["", "two cats, é!"]
    ours, theirs = backbone.encode_prompts(prompts), again.encode_prompts(prompts)
    assert {key: t.tolist() for key, t in ours.tensors().items()} == {
        key: t.tolist() for key, t in theirs.tensors().items()
    }


@pytest.mark.parametrize("name", TINY)
def test_the_same_backbone_gives_the_same_bytes(
    written: dict[str, tuple[Backbone, Path]], name: str, tmp_path: Path
):
    _, path = written[name]
    save_single_file(load_single_file(path), tmp_path / path.name)
    assert (tmp_path / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("name", ["sd2", "sd3.5"])
def test_a_folder_and_a_file_are_the_same_base(
    written: dict[str, tuple[Backbone, Path]], name: str, tmp_path: Path
):
    backbone, path = written[name]
    backbone.save(tmp_path / "folder")
    save_single_file(load_backbone(tmp_path / "folder"), tmp_path / path.name)
    (ours, metadata), (theirs, _) = tensors_of(tmp_path / path.name), tensors_of(path)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert load_single_file(tmp_path / path.name).sha256 == backbone.sha256
    assert str(tmp_path) not in "".join(metadata.values())  # no file tells where it was made


def test_types_of_weights(written: dict[str, tuple[Backbone, Path]], tmp_path: Path):
    backbone, path = written["sd1"]
    save_single_file(backbone, tmp_path / path.name, torch.float16)
    kept, _ = tensors_of(tmp_path / path.name)
    assert {tensor.dtype for tensor in kept.values()} == {torch.float16}
    for dtype, expected in ((None, torch.float16), (torch.bfloat16, torch.bfloat16), (torch.float32,) * 2):
        again = load_single_file(tmp_path / path.name, dtype=dtype)
        assert {t.dtype for t in weights(again).values() if t.is_floating_point()} == {expected}
    before = weights(backbone)
    assert all(
        torch.equal(tensor, before[key].half().float()) if tensor.is_floating_point() else True
        for key, tensor in weights(load_single_file(tmp_path / path.name)).items()
    )


def test_the_header_tells_other_tools(written: dict[str, tuple[Backbone, Path]]):
    said = {name: tensors_of(path)[1] for name, (_, path) in written.items()}
    kinds = {name: metadata["modelspec.architecture"] for name, metadata in said.items()}
    assert kinds == {
        "sd1": "stable-diffusion-v1",
        "sd2": "stable-diffusion-v2-768-v",
        "sdxl": "stable-diffusion-xl-v1-base",
        "sd3": "stable-diffusion-3-medium",
        "sd3.5": "stable-diffusion-3-5-medium",
        "sd3.5 without T5": "stable-diffusion-3-5-medium",
    }
    assert said["sd2"]["modelspec.prediction_type"] == "v"
    assert said["sd1"]["modelspec.prediction_type"] == "epsilon"
    assert "modelspec.prediction_type" not in said["sd3"]
    assert said["sdxl"]["modelspec.resolution"] == "32x32"


def test_attached_adapters_are_not_written_as_weights(tmp_path: Path):
    backbone = SD1.tiny()
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["to_q"]), backbone.denoiser)
    with pytest.raises(
        LiveryError, match="unet has other weights than its configuration says; undo or merge"
    ):
        save_single_file(backbone, tmp_path / "x.safetensors")
    assert not (tmp_path / "x.safetensors").exists()


# ------------------------------------------------------------------ files of others


@pytest.fixture
def shipped(monkeypatch: pytest.MonkeyPatch) -> Callable[[Mapping[str, Architecture]], None]:
    """Puts tiny architectures in the place of those that ship."""

    def put(found: Mapping[str, Architecture]) -> None:
        monkeypatch.setattr(architectures, "NAMES", tuple(found))
        monkeypatch.setattr(architectures, "architecture", found.__getitem__)

    return put


def strangers(tmp_path: Path, backbone: Backbone, **changes: Any) -> tuple[Path, Architecture]:
    """A file as others write it, without livery's header and with junk, and its architecture."""
    path = tmp_path / "model.safetensors"
    save_single_file(backbone, path)
    tensors, metadata = tensors_of(path)
    said = json.loads(metadata[recognition.CARD])
    parts = {part: config for part, config in said["parts"].items() if part != "tokenizer_3"}
    tensors |= changes
    plain = {name: tensor.contiguous() for name, tensor in tensors.items() if tensor is not None}
    safetensors.torch.save_file(plain, path)
    return path, Architecture("a tiny one", said["family"], said["layout"], parts, said["settings"])


@pytest.mark.parametrize("name", TINY)
def test_a_file_of_another_tool_is_known_by_its_shapes(name: str, tmp_path: Path, shipped: Any):
    backbone = TINY[name]()
    path, found = strangers(
        tmp_path,
        backbone,
        betas=torch.ones(3),
        **{"model_ema.decay": torch.tensor(0.9), "first_stage_model.loss.logvar": torch.tensor(0.0)},
    )
    shipped({"small": found})
    again = load_single_file(path)
    before = {k: t for k, t in weights(backbone).items() if not k.startswith("text_encoder_3.")}
    after = weights(again)
    assert set(after) == set(before)
    assert all(torch.equal(after[key], before[key]) for key in before)
    if name.startswith("sd3") and "without" not in name:
        assert "loaded without text_encoder_3 (T5): its words are in no package" in again.notes[0]
        assert "text_encoder_3" not in again.towers
    else:
        assert again.notes == ()


def test_clips_words_come_from_livery(tmp_path: Path, shipped: Any):
    backbone: Any = SD1.tiny()
    tower = backbone.towers["text_encoder"]
    tower.embeddings.token_embedding = torch.nn.Embedding(49408, 32).requires_grad_(False)
    tower.config.vocab_size = 49408
    backbone.tokenizers["text_encoder"] = clip_tokenizer(model_max_length=16)
    path, found = strangers(tmp_path, backbone)
    assert found.parts["tokenizer"] == {**architecture("sd1.5").parts["tokenizer"], "model_max_length": 16}
    shipped({"small": found})
    ids = load_single_file(path).tokenizers["text_encoder"](["a photo of a cat"])["input_ids"][0]
    assert ids == [49406, 320, 1125, 539, 320, 2368, 49407]


def test_t5_is_read_when_its_words_are_beside_the_file(tmp_path: Path, shipped: Any):
    backbone = SD3.tiny()
    path, found = strangers(tmp_path, backbone)
    shipped({"small": found})
    words = tiny.letter_tokenizer(length=24)
    words.save_pretrained(tmp_path / "elsewhere" / "tokenizer_3")
    assert "text_encoder_3" not in load_single_file(path).towers
    again = load_single_file(path, beside=tmp_path / "elsewhere")
    assert again.notes == ()
    assert weights(again).keys() == weights(backbone).keys()
    shutil.move(tmp_path / "elsewhere" / "tokenizer_3", tmp_path / "tokenizer_3")
    assert load_single_file(path).sha256 == again.sha256
    prompts = ["a cat"]
    assert torch.equal(again.encode_prompts(prompts).tokens, backbone.encode_prompts(prompts).tokens)


def test_parts_that_a_file_lacks_are_read_from_beside_it(tmp_path: Path, shipped: Any):
    """SD3.5 is published as transformer and autoencoder alone."""
    backbone = SD3.tiny()
    path, found = strangers(tmp_path, backbone)
    shipped({"small": found})
    tensors, _ = tensors_of(path)
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith("text_encoders.")}
    assert len(kept) < len(tensors)
    safetensors.torch.save_file(kept, path)
    with pytest.raises(
        LiveryError, match=r"it holds no text_encoder .* put the folder text_encoder of a diff"
    ):
        load_single_file(path)
    backbone.save(tmp_path / "folder")
    again = load_single_file(path, beside=tmp_path / "folder")
    assert again.sha256 == backbone.sha256
    assert [note.split(":")[0] for note in again.notes] == [
        f"model.safetensors has no {part}" for part in ("text_encoder", "text_encoder_2", "text_encoder_3")
    ]
    shutil.rmtree(tmp_path / "folder" / "text_encoder_3")
    assert "text_encoder_3" not in load_single_file(path, beside=tmp_path / "folder").towers


def test_t5_that_cannot_be_used_need_not_be_understood(tmp_path: Path, shipped: Any):
    """As in files with T5 in scaled 8-bit numbers, which need more tensors."""
    scale = {"text_encoders.t5xxl.transformer.shared.scale_weight": torch.ones(1)}
    path, found = strangers(tmp_path, SD3.tiny(), **scale)
    shipped({"small": found})
    assert "text_encoder_3" not in load_single_file(path).towers
    tiny.letter_tokenizer(length=24).save_pretrained(tmp_path / "tokenizer_3")
    with pytest.raises(LiveryError, match=r"shared\.scale_weight is one too many"):
        load_single_file(path)


def test_a_missing_projection_of_clip_is_the_identity(tmp_path: Path, shipped: Any):
    """SD3's files hold none, for its first CLIP is not projected."""
    name = "text_encoders.clip_l.transformer.text_projection.weight"
    path, found = strangers(tmp_path, SD3.tiny(t5=False), **{name: None})
    shipped({"small": found})
    tower: Any = load_single_file(path).towers["text_encoder"]
    assert torch.equal(tower.text_projection.weight, torch.eye(16))


def test_names_of_the_first_fine_tunes(tmp_path: Path, shipped: Any):
    backbone = SD1.tiny()
    path, found = strangers(tmp_path, backbone)
    shipped({"small": found})
    tensors, _ = tensors_of(path)
    old = {name.replace(".transformer.text_model.", ".transformer."): t for name, t in tensors.items()}
    assert old.keys() != tensors.keys()
    safetensors.torch.save_file(old, path)
    assert load_single_file(path).towers.keys() == {"text_encoder"}


def test_tensors_of_no_part_are_told(tmp_path: Path, shipped: Any):
    path, found = strangers(tmp_path, SD1.tiny(), **{"embedding_manager.x": torch.ones(2)})
    shipped({"small": found})
    assert load_single_file(path).notes == (
        "model.safetensors has 1 tensors that no part reads, first embedding_manager.x: left out",
    )


CONV_IN = "model.diffusion_model.input_blocks.0.0.weight"


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({CONV_IN: torch.zeros(32, 9, 3, 3)}, r"\[32, 9, 3, 3\] instead of \[32, 4, 3, 3\] \(an inpainting"),
        ({"model.diffusion_model.out.0.bias": None}, r"model\.diffusion_model\.out\.0\.bias is missing"),
        ({"first_stage_model.x": torch.ones(1)}, r"first_stage_model\.x is one too many"),
    ],
)
def test_a_file_that_fits_nothing_is_refused(tmp_path: Path, shipped: Any, change: dict[str, Any], what: str):
    path, found = strangers(tmp_path, SD1.tiny(), **change)
    shipped({"small": found})
    with pytest.raises(LiveryError, match=f"not a tiny one: .*{what}.*; other sizes are read from"):
        load_single_file(path)


def test_a_file_without_an_autoencoder_is_refused(tmp_path: Path, shipped: Any):
    path, found = strangers(tmp_path, SD1.tiny())
    shipped({"small": found})
    tensors, _ = tensors_of(path)
    kept = {name: t for name, t in tensors.items() if not name.startswith("first_stage_model.")}
    safetensors.torch.save_file(kept, path)
    with pytest.raises(LiveryError, match=r"it holds no vae \(first_stage_model\.\*\), get the file that"):
        load_single_file(path)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_full_size_files_are_known_by_their_headers(name: str, prediction: str):
    found = architecture(name)
    layout, stored = LAYOUTS[found.layout], dict[str, Stored]()
    for part in found.modules:
        with torch.device("meta"):
            state = architectures.build(found.parts[part], part).state_dict()
        for entry in layout.entries(part, found.parts[part], state):
            shape = tuple(entry.way.join([state[ours] for ours in entry.ours]).shape)
            stored[entry.theirs] = Stored(torch.float16, shape)
    assert recognition.layout_of(Path("x"), stored) is layout
    header = Header({}, stored)
    known = recognition.matched(Path("x"), header, layout, recognition.canonical(stored), prediction)
    twins = {"sd2.1": "v_prediction", "sd2.1-base": "epsilon"}
    if name in twins:
        assert known == architecture(next(twin for twin, what in twins.items() if what == prediction))
    else:
        assert known == found


def test_a_tiny_file_is_told_from_the_real_sizes(tmp_path: Path):
    path, _ = strangers(tmp_path, SDXL.tiny())
    with pytest.raises(LiveryError, match=r"not Stable Diffusion XL base 1\.0: .* is \[.*\] instead of \["):
        load_single_file(path)


@pytest.mark.parametrize(
    ("key", "what"),
    [
        ("lora_unet_down_blocks_0.lora_down.weight", "an adapter, not a base model"),
        ("unet.down_blocks.0.lora_A.weight", "an adapter, not a base model"),
        ("conditioner.embedders.0.model.ln_final.bias", "an SDXL refiner"),
        ("emb_params", "an embedding, not a base model"),
        ("double_blocks.0.img_attn.norm.key_norm.scale", "a FLUX or other model"),
        ("joint_blocks.0.x_block.attn.qkv.weight", "the transformer of SD3 alone"),
        ("down_blocks.0.resnets.0.conv1.weight", "one part of a diffusers folder"),
        ("model.diffusion_model.input_blocks.0.0.weight", "a denoiser without its text encoders"),
        ("something", "not a checkpoint in the layout of Stable Diffusion"),
    ],
)
def test_other_files_are_named(tmp_path: Path, key: str, what: str):
    path = tmp_path / "x.safetensors"
    safetensors.torch.save_file({key: torch.ones(1)}, path)
    with pytest.raises(LiveryError, match=what):
        load_backbone(path)


def test_pickles_are_refused(tmp_path: Path):
    torch.save({"w": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(LiveryError, match="a pickle, which can run code when read; convert it"):
        load_backbone(tmp_path / "model.safetensors")


def test_another_family_is_refused(written: dict[str, tuple[Backbone, Path]]):
    with pytest.raises(LiveryError, match="a checkpoint of the family sd1, not sdxl"):
        load_backbone(written["sd1"][1], family="sdxl")


# ------------------------------------------------------------------ what it predicts


def prediction(backbone: Backbone) -> str:
    return backbone.noise.prediction  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    ("metadata", "given", "expected"),
    [
        ({}, None, "epsilon"),
        ({}, "v", "v_prediction"),
        ({"modelspec.prediction_type": "v"}, None, "v_prediction"),
        ({"modelspec.prediction_type": "epsilon"}, "v_prediction", "v_prediction"),
        ({"modelspec.architecture": "stable-diffusion-v2-768-v"}, None, "v_prediction"),
    ],
)
def test_the_caller_then_the_header_say_what_is_predicted(
    tmp_path: Path, shipped: Any, metadata: dict[str, str], given: str | None, expected: str
):
    path, found = strangers(tmp_path, SD1.tiny())
    shipped({"small": found})
    safetensors.torch.save_file(tensors_of(path)[0], path, metadata)
    again = load_single_file(path, prediction=given)
    assert prediction(again) == expected
    assert again.notes == ()


@pytest.mark.parametrize(("spread", "expected"), [(0.2, "v_prediction"), (0.01, "epsilon")])
def test_sd2_is_told_by_its_weights_and_says_so(
    tmp_path: Path, shipped: Any, monkeypatch: pytest.MonkeyPatch, spread: float, expected: str
):
    """Two architectures of one shape, as SD 2.1 and its base: the prediction chooses."""
    name = "model.diffusion_model.output_blocks.3.1.transformer_blocks.0.norm1.bias"
    monkeypatch.setattr(recognition, "SPREAD", name)
    values = torch.tensor([spread, -spread]).repeat(16)
    path, found = strangers(tmp_path, SD1.tiny(prediction="v_prediction"), **{name: values})
    other = {**found.parts["scheduler"], "prediction_type": "epsilon"}
    unet = {**found.parts["unet"], "sample_size": 8}
    base = replace(found, title="its base", parts={**found.parts, "scheduler": other, "unet": unet})
    shipped({"v": found, "base": base})
    again = load_single_file(path)
    assert prediction(again) == expected
    assert again.resolution == (32 if expected == "v_prediction" else 16)
    assert "model.safetensors does not say what it predicts: taken for" in again.notes[0]
    told = load_single_file(path, prediction="epsilon")
    assert (prediction(told), told.resolution, told.notes) == ("epsilon", 16, ())


def test_markers_of_v_prediction_sdxl(tmp_path: Path, shipped: Any):
    backbone: Any = SDXL.tiny()
    path, found = strangers(tmp_path, backbone, v_pred=torch.empty(0), ztsnr=torch.empty(0))
    shipped({"small": found})
    again: Any = load_single_file(path)
    assert prediction(again) == "v_prediction"
    assert again.scheduler.config.rescale_betas_zero_snr
    assert again.noise.alpha_bar[-1] < 1e-6
    save_single_file(again, tmp_path / "again.safetensors")
    assert {"v_pred", "ztsnr"} <= tensors_of(tmp_path / "again.safetensors")[0].keys()
    assert load_single_file(tmp_path / "again.safetensors").sha256 == again.sha256


def test_a_prediction_that_does_not_fit_is_refused(written: dict[str, tuple[Backbone, Path]]):
    with pytest.raises(LiveryError, match="prediction 'x' is not one livery knows"):
        load_single_file(written["sd1"][1], prediction="x")
    with pytest.raises(LiveryError, match="does not fit SD3, which predicts the flow"):
        load_single_file(written["sd3"][1], prediction="v")


# ------------------------------------------------------------------ headers from strangers


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"version": 99}, "written by a newer livery"),
        ({"family": "sdxl"}, "what livery wrote into its header is damaged"),
        ({"layout": "sd9"}, "what livery wrote into its header is damaged"),
        ({"surprise": 1}, "what livery wrote into its header is damaged"),
        ({"layout": "sd2"}, "its header says sd2, its tensors sd1"),
        ({"parts": {"unet": {"_class_name": "Popen"}}}, "unet is of the class Popen; not one livery reads"),
    ],
)
def test_a_header_that_does_not_fit_is_refused(
    written: dict[str, tuple[Backbone, Path]], tmp_path: Path, change: dict[str, Any], what: str
):
    tensors, metadata = tensors_of(written["sd1"][1])
    card = json.dumps({**json.loads(metadata[recognition.CARD]), **change})
    safetensors.torch.save_file(tensors, tmp_path / "x.safetensors", {recognition.CARD: card})
    with pytest.raises(LiveryError, match=what):
        load_single_file(tmp_path / "x.safetensors")


def test_tokenizer_files_of_a_header_have_known_names():
    config = {"_class_name": "CLIPTokenizer", "files": {"../../evil.py": "1"}}
    with pytest.raises(LiveryError, match=r"tokenizer has a file \.\./\.\./evil\.py; not one livery reads"):
        part_config.restored(Path("x"), "tokenizer", config)


def test_every_layout_is_tried_here():
    assert {name.split()[0].removesuffix(".5") for name in TINY} == set(LAYOUTS)
