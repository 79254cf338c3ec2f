"""A real CLIPModel with random weights: loading, preprocessing and vectors, not the quality of a judge."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from livery.evaluate.embedder import ClipEmbedder, Preprocessing, load_embedder
from livery.nouns import LiveryError
from tests.evaluate.tiny_clip import write_preprocessor, write_tiny_clip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_clip(tmp_path_factory.mktemp("judge"))


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def test_vectors_have_length_one_and_differ(folder: Path):
    judge = ClipEmbedder.load(folder)
    images = judge.embed_images([noise(40, 30, seed) for seed in range(3)])
    texts = judge.embed_texts(["a cat", "a dog with a hat"])
    assert (images.shape, texts.shape) == ((3, 16), (2, 16))
    for vectors in (images, texts):
        assert torch.allclose(vectors.norm(dim=1), torch.ones(len(vectors)), atol=1e-6)
    assert not torch.allclose(texts[0], texts[1])
    assert judge.embed_images([]).shape == (0, 16)


def test_vectors_are_those_of_transformers_own_model(folder: Path):
    from transformers import CLIPModel, CLIPTokenizer

    model, tokenizer = CLIPModel.from_pretrained(folder), CLIPTokenizer.from_pretrained(folder)
    with torch.no_grad():
        features: Any = model.eval().get_text_features(**tokenizer(["a red cat"], return_tensors="pt"))
    own = torch.nn.functional.normalize(features.pooler_output, dim=-1)
    assert torch.allclose(ClipEmbedder.load(folder).embed_texts(["a red cat"]), own, atol=1e-5)


def test_a_row_does_not_hang_on_its_neighbours(folder: Path):
    judge = ClipEmbedder.load(folder)
    texts = ["a cat", "a much longer text about a cat on a mat"]
    assert torch.allclose(judge.embed_texts(texts)[:1], judge.embed_texts(texts[:1]), atol=1e-6)
    images = [noise(32, 32, seed) for seed in range(70)]  # more than one batch
    assert torch.allclose(judge.embed_images(images)[69:], judge.embed_images(images[69:]), atol=1e-6)


def test_weights_in_half_precision_are_read_and_used_in_full(folder: Path, tmp_path: Path):
    half = shutil.copytree(folder, tmp_path / "half")
    weights = {key: value.half() for key, value in load_file(half / "model.safetensors").items()}
    save_file(weights, half / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((half / "config.json").read_text())
    (half / "config.json").write_text(json.dumps({**config, "dtype": "float16"}))
    image = noise(32, 32)
    low, full = (ClipEmbedder.load(path).embed_images([image]) for path in (half, folder))
    assert low.dtype == torch.float32
    assert torch.allclose(low, full, atol=5e-3)


def test_texts_past_the_models_length_are_cut_not_refused(folder: Path):
    assert ClipEmbedder.load(folder).embed_texts(["cat " * 100]).isfinite().all()


@pytest.mark.parametrize("size", [(64, 48), (48, 64), (31, 57), (32, 32), (200, 33)])
def test_preprocessing_equals_transformers_own(tmp_path: Path, size: tuple[int, int]):
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    theirs = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    image = noise(*size)
    expected = torch.from_numpy(np.asarray(theirs(image)["pixel_values"][0]))
    assert torch.allclose(Preprocessing.read(tmp_path, 32)(image), expected, atol=1e-5)


def test_a_stored_preprocessing_is_obeyed(tmp_path: Path):
    half = [0.5, 0.5, 0.5]
    write_preprocessor(
        tmp_path,
        size={"height": 16, "width": 16},
        do_center_crop=False,
        image_mean=half,
        image_std=half,
        resample=2,
    )
    pixels = Preprocessing.read(tmp_path, 32)(Image.new("RGB", (50, 20), "white"))
    assert pixels.shape == (3, 16, 16)
    assert torch.allclose(pixels, torch.ones_like(pixels))


def test_what_is_transparent_counts_as_white(folder: Path):
    judge = ClipEmbedder.load(folder)
    hidden = Image.new("RGBA", (32, 32), (255, 0, 0, 0))
    white = Image.new("RGB", (32, 32), "white")
    assert torch.equal(judge.embed_images([hidden]), judge.embed_images([white]))


def test_the_card_and_the_hash_follow_the_folder(tmp_path: Path):
    write_tiny_clip(tmp_path)
    plain = ClipEmbedder.load(tmp_path)
    assert plain.card.concept_texts(["cat"]) == ["a cat"]
    assert plain.card.style_texts(["flat"]) == ["flat style"]
    (tmp_path / "livery.json").write_text(
        json.dumps(
            {
                "name": "theirs",
                "concept_template": "one {concept}",
                "style_template": "{style} look",
                "reliability": {"held_out": 223, "style": 0.9},
            }
        )
    )
    carded = ClipEmbedder.load(tmp_path)
    assert carded.card.style_texts(["flat"]) == ["flat look"]
    assert carded.card.concept_texts(["cat", "{concept}"]) == ["one cat", "one {concept}"]
    assert carded.card.reliability == {"held_out": 223, "style": 0.9}
    assert (carded.name, plain.name) == ("theirs", tmp_path.name)
    assert ClipEmbedder.load(tmp_path, name="mine").name == "mine"
    assert carded.sha256 != plain.sha256 == ClipEmbedder.load(write_tiny_clip(tmp_path / "again")).sha256


def test_bad_folders_are_named(tmp_path: Path):
    with pytest.raises(LiveryError, match=r"no config\.json"):
        load_embedder(tmp_path)
    write_tiny_clip(tmp_path)
    (tmp_path / "livery.json").write_text('{"concept_templat": "x"}')
    with pytest.raises(LiveryError, match="did you mean 'concept_template'"):
        load_embedder(tmp_path)
    (tmp_path / "livery.json").write_text("{")
    with pytest.raises(LiveryError, match=r"livery\.json: not JSON"):
        load_embedder(tmp_path)


def test_pickles_are_not_read(tmp_path: Path):
    write_tiny_clip(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(LiveryError, match="safetensors"):
        load_embedder(tmp_path)


def test_broken_weights_are_one_clear_line(tmp_path: Path):
    write_tiny_clip(tmp_path)
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(LiveryError, match="not a CLIP model that can be read"):
        load_embedder(tmp_path)


def test_missing_weights_are_refused_not_invented(tmp_path: Path):
    write_tiny_clip(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["visual_projection.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(LiveryError, match="lack visual_projection"):
        load_embedder(tmp_path)
