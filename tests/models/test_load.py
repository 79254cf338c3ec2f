"""Which family a folder belongs to, and what is said when none reads it."""

import json
from pathlib import Path

import pytest

from livery.models import load
from livery.models.load import load_backbone
from livery.models.sd1 import SD1
from livery.nouns import LiveryError


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "tiny"
    SD1.tiny().save(folder)
    return folder


def test_the_family_is_read_from_the_folder(saved: Path):
    for backbone in (load_backbone(saved), load_backbone(str(saved), family="sd1")):
        assert isinstance(backbone, SD1)
        assert backbone.sha256 == SD1.tiny().sha256


@pytest.mark.parametrize(
    ("pipeline", "what"),
    [
        ("StableDiffusionXLInpaintPipeline", "a special SDXL model"),
        ("StableDiffusionXLImg2ImgPipeline", "a SDXL refiner or image-to-image model"),
        ("StableDiffusion3ControlNetPipeline", "a special Stable Diffusion 3 model"),
        ("StableDiffusionUpscalePipeline", "a special Stable Diffusion model"),
        ("FluxPipeline", "a FLUX model"),
        ("WanPipeline", "a WanPipeline model"),
    ],
)
def test_a_folder_of_no_family_is_called_by_its_name(tmp_path: Path, pipeline: str, what: str):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": pipeline}))
    with pytest.raises(LiveryError, match=what):
        load_backbone(tmp_path)


def test_an_unknown_family_name_is_refused(saved: Path):
    with pytest.raises(LiveryError, match="'sd1'"):
        load_backbone(saved, family="sd11")


def test_missing_sources_are_refused(tmp_path: Path):
    with pytest.raises(LiveryError, match="no such folder"):
        load_backbone(tmp_path / "nowhere")
    file = tmp_path / "model.safetensors"
    file.touch()
    with pytest.raises(LiveryError, match="not a safetensors file"):
        load_backbone(file)
    with pytest.raises(LiveryError, match="a file where a diffusers folder is wanted"):
        SD1.load(file)
    with pytest.raises(LiveryError, match=r"name the file itself, model\.safetensors"):
        load_backbone(tmp_path)


def test_the_starter_is_a_folder_of_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(load.importlib.resources, "files", lambda _: tmp_path)
    with pytest.raises(LiveryError, match="starter: the built-in base model is not in this installation"):
        load_backbone("starter")
    SD1.tiny().save(tmp_path / "starter" / "base")
    assert load_backbone("starter").sha256 == SD1.tiny().sha256
