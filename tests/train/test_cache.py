"""The cache: keyed by content, atomic, bounded in memory; and pictures fitted to squares."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from livery.models.sd1 import SD1
from livery.nouns import Photo
from livery.train.cache import Encodings, TensorCache, fit_square


def test_what_was_made_once_is_read_by_the_next_cache_bit_for_bit(tmp_path: Path):
    made = TensorCache(tmp_path).get("ab" * 32, lambda: {"x": torch.randn(3)})
    again = TensorCache(tmp_path).get("ab" * 32, _never)
    assert torch.equal(made["x"], again["x"])


def test_a_damaged_entry_is_made_anew(tmp_path: Path):
    TensorCache(tmp_path).get("ab" * 32, lambda: {"x": torch.zeros(3)})
    [file] = tmp_path.rglob("*.safetensors")
    file.write_bytes(file.read_bytes()[:10])
    assert TensorCache(tmp_path).get("ab" * 32, lambda: {"x": torch.ones(3)})["x"].tolist() == [1, 1, 1]
    assert TensorCache(tmp_path).get("ab" * 32, _never)["x"].tolist() == [1, 1, 1]


def test_beyond_its_bound_memory_is_not_used_but_the_disk_still_is(tmp_path: Path):
    cache = TensorCache(tmp_path, memory_bytes=12)
    cache.get("a" * 64, lambda: {"x": torch.zeros(3)})
    cache.get("b" * 64, lambda: {"x": torch.ones(3)})
    for file in tmp_path.rglob("*.safetensors"):
        file.unlink()
    assert cache.get("a" * 64, _never)["x"].tolist() == [0, 0, 0]
    with pytest.raises(AssertionError):
        cache.get("b" * 64, _never)


def test_a_wide_picture_is_cut_evenly_at_both_ends():
    image = Image.new("RGB", (40, 10), "white")
    image.paste("black", (15, 0, 25, 10))
    square = fit_square(image, 10)
    assert square.shape == (3, 10, 10)
    assert square.max() == -1.0


def test_a_square_of_the_right_side_keeps_its_pixels():
    image = Image.effect_noise((16, 16), 50).convert("RGB")
    back = ((fit_square(image, 16) + 1) * 127.5).round().to(torch.uint8)
    assert back.permute(1, 2, 0).numpy().tobytes() == image.tobytes()


@pytest.mark.parametrize("size", [(31, 17), (17, 31), (5, 5), (1000, 3)])
def test_any_shape_becomes_the_square_within_range(size: tuple[int, int]):
    square = fit_square(Image.new("L", size, 200), 16)
    assert square.shape == (3, 16, 16)
    assert torch.allclose(square, torch.tensor(200 / 127.5 - 1), atol=1e-6)


PHOTO = Photo(sha256="1" * 64, width=32, height=32)


def _never() -> dict[str, torch.Tensor]:
    raise AssertionError("made again")


def _encodings(
    folder: Path, base: SD1, looked: list[str], side: int = 32, towers_train: bool = False
) -> Encodings:
    def pixels(photo: Photo) -> Image.Image:
        looked.append(photo.sha256)
        return Image.new("RGB", (32, 32), "red")

    return Encodings(base, TensorCache(folder), pixels, side, towers_train=towers_train)


def test_encodings_equal_the_backbone_s_own_and_are_made_once(tmp_path: Path):
    base, looked = SD1.tiny(), []
    for _ in range(2):
        encodings = _encodings(tmp_path, base, looked)
        list(encodings.fill([PHOTO], ["a cat", "", "a cat"]))
        red = fit_square(Image.new("RGB", (32, 32), "red"), 32)[None]
        assert torch.equal(encodings.latents([PHOTO]), base.encode_images(red))
        for text in ("a cat", ""):
            assert torch.equal(encodings.prompts([text]).tokens, base.encode_prompts([text]).tokens)
    assert looked == [PHOTO.sha256]


def test_another_size_base_or_photo_is_another_entry(tmp_path: Path):
    looked: list[str] = []
    base, other = SD1.tiny(0), SD1.tiny(1)
    _encodings(tmp_path, base, looked).latents([PHOTO])
    _encodings(tmp_path, base, looked, side=16).latents([PHOTO])
    _encodings(tmp_path, other, looked).latents([PHOTO])
    _encodings(tmp_path, base, looked).latents([PHOTO.model_copy(update={"sha256": "2" * 64})])
    assert len(looked) == 4
    a = _encodings(tmp_path, base, looked).prompts(["x"]).tokens
    assert not torch.equal(a, _encodings(tmp_path, other, looked).prompts(["x"]).tokens)


def test_prompts_are_never_cached_while_the_towers_train(tmp_path: Path):
    base = SD1.tiny()
    encodings = _encodings(tmp_path, base, [], towers_train=True)
    list(encodings.fill([], ["a cat"]))
    base.text_encoder.requires_grad_(True)
    assert encodings.prompts(["a cat"]).tokens.requires_grad
    assert not list(tmp_path.rglob("*.safetensors"))


def test_fill_reports_each_item(tmp_path: Path):
    events = list(_encodings(tmp_path, SD1.tiny(), []).fill([PHOTO], ["a", "b"]))
    assert [(e.stage, e.done, e.total) for e in events] == [
        ("encode pictures", 1, 1),
        ("encode captions", 1, 2),
        ("encode captions", 2, 2),
    ]
