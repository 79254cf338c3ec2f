"""Memory does not grow with the number of pictures: neither while they are encoded nor while they train."""

import gc
from pathlib import Path

import torch
from PIL import Image

from livery.models.sd1 import SD1
from livery.nouns import Photo, PicturesSpec, Recipe
from livery.train.batches import Plan, batches_of_step
from livery.train.buckets import Framing
from livery.train.cache import Encodings, TensorCache

LATENTS = 4 * 64 * 64 * 4  # bytes of one entry at 128 px
BOUND = 3 * LATENTS


def held() -> int:
    """Bytes of all tensors that are alive."""
    gc.collect()
    seen = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in gc.get_objects()
        if type(tensor) in (torch.Tensor, torch.nn.Parameter)  # those of dry runs hold no bytes
    }
    return sum(seen.values())


def held_after(folder: Path, base: SD1, count: int, bound: int) -> int:
    """What tensors take, beyond what was there, after filling a cache and after reading it for training."""
    photos = [
        Photo(sha256=f"{i:064x}", width=64, height=64, captions=(f"picture {i}",)) for i in range(count)
    ]
    recipe = Recipe(batch_size=2, pictures=PicturesSpec(resolutions=(128,), flip=0.5))
    plan = Plan(photos, recipe, Framing.of(recipe, base))
    cache = TensorCache(folder, memory_bytes=bound)
    encodings = Encodings(
        base, cache, lambda photo: Image.new("RGB", (64, 64)), recipe.pictures, towers_train=False
    )
    before = held()
    list(encodings.fill(plan.shown(), plan.captions()))
    filled = held()
    for step in range(count):
        for rows in batches_of_step(plan, step):
            encodings.latents(rows)
            encodings.prompts(rows)
    return max(filled, held()) - before


def test_tensors_held_do_not_hang_on_the_number_of_pictures(tmp_path: Path):
    base = SD1.tiny()
    few, many = (held_after(tmp_path / f"{count}", base, count, BOUND) for count in (6, 18))
    assert BOUND // 2 < few <= BOUND
    assert BOUND // 2 < many <= BOUND


def test_the_measure_would_see_them_if_they_were_kept(tmp_path: Path):
    base = SD1.tiny()
    few, many = (held_after(tmp_path / f"{count}", base, count, 1 << 30) for count in (6, 18))
    assert many - few > 10 * LATENTS
