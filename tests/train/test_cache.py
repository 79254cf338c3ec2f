"""The cache: named by content and by what encodes it, atomic, bounded in memory; encodings from it."""

import copy
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from livery.models.sd1 import SD1
from livery.nouns import CaptionsSpec, Photo, PicturesSpec, Recipe
from livery.train.batches import Plan, Row, batches_of_step, held_out_row
from livery.train.buckets import Framing, Shown, shown_mask, shown_pixels
from livery.train.cache import Encodings, TensorCache
from livery.train.cache_folder import look, set_limit

# ------------------------------------------------------------------ the folder


def test_what_was_made_once_is_read_by_the_next_cache_bit_for_bit(tmp_path: Path):
    made = TensorCache(tmp_path).get("latents", "ab" * 32, lambda: {"x": torch.randn(3)})
    again = TensorCache(tmp_path).get("latents", "ab" * 32, _never)
    assert torch.equal(made["x"], again["x"])


def test_kinds_do_not_meet(tmp_path: Path):
    cache = TensorCache(tmp_path)
    cache.get("latents", "ab" * 32, lambda: {"x": torch.zeros(3)})
    assert cache.get("masks", "ab" * 32, lambda: {"x": torch.ones(3)})["x"].tolist() == [1, 1, 1]
    assert cache.get("latents", "ab" * 32, _never)["x"].tolist() == [0, 0, 0]
    assert cache.has("masks", "ab" * 32)
    assert not cache.has("prompts", "ab" * 32)


@pytest.mark.parametrize("keep", [0, 10, 70])
def test_a_damaged_entry_is_made_anew(tmp_path: Path, keep: int):
    TensorCache(tmp_path).get("latents", "ab" * 32, lambda: {"x": torch.zeros(3)})
    [file] = tmp_path.rglob("*.safetensors")
    file.write_bytes(file.read_bytes()[:keep])
    assert TensorCache(tmp_path).get("latents", "ab" * 32, _ones)["x"].tolist() == [1, 1, 1]
    assert TensorCache(tmp_path).get("latents", "ab" * 32, _never)["x"].tolist() == [1, 1, 1]


def test_memory_is_bounded_and_keeps_what_was_used_last(tmp_path: Path):
    cache = TensorCache(tmp_path, memory_bytes=24)  # two entries of three numbers
    for name in ("a", "b"):
        cache.get("x", name * 64, _ones)
    cache.get("x", "a" * 64, _never)
    cache.get("x", "c" * 64, _ones)
    for file in tmp_path.rglob("*.safetensors"):
        file.unlink()
    for name in ("a", "c"):
        assert cache.get("x", name * 64, _never)["x"].tolist() == [1, 1, 1]
    with pytest.raises(AssertionError):
        cache.get("x", "b" * 64, _never)


def test_an_entry_larger_than_the_bound_comes_from_the_disk(tmp_path: Path):
    cache = TensorCache(tmp_path, memory_bytes=4)
    cache.get("x", "a" * 64, _ones)
    assert cache.get("x", "a" * 64, _never)["x"].tolist() == [1, 1, 1]


# ------------------------------------------------------------------ encodings

PHOTO = Photo(sha256="1" * 64, width=40, height=32, captions=("a cat",))
FRAMING = Framing((32,), 4)


class Counting:
    """Noise of each photo's hash; counts how often each is read."""

    def __init__(self) -> None:
        self.read: list[str] = []

    def __call__(self, photo: Photo) -> Image.Image:
        self.read.append(photo.sha256)
        return picture(photo)


def picture(photo: Photo) -> Image.Image:
    random = torch.Generator().manual_seed(int(photo.sha256[:8], 16))
    noise = torch.randint(0, 256, (photo.height, photo.width, 3), generator=random, dtype=torch.uint8)
    return Image.fromarray(noise.numpy())


def encodings(
    folder: Path, base: SD1, pixels: Counting | None = None, towers_train: bool = False, **pictures: object
) -> Encodings:
    spec = PicturesSpec.model_validate(pictures)
    return Encodings(base, TensorCache(folder), pixels or Counting(), spec, towers_train=towers_train)


def shown(photo: Photo = PHOTO, framing: Framing = FRAMING) -> Shown:
    return Shown(photo, framing.view(photo.width, photo.height, framing.sides[0]))


def asked(*captions: str) -> list[Row]:
    photos = [PHOTO.model_copy(update={"captions": (text,)}) for text in captions]
    return [held_out_row(photo, Recipe(), FRAMING) for photo in photos]


@pytest.fixture(scope="module")
def base() -> SD1:
    return SD1.tiny()


def test_encodings_equal_the_backbone_s_own_and_are_made_once(tmp_path: Path, base: SD1):
    pixels, one = Counting(), shown()
    for _ in range(2):
        made = encodings(tmp_path, base, pixels)
        list(made.fill([one], ["a cat", "", "a cat"]))
        expected = base.encode_images(shown_pixels(picture(PHOTO), one.view)[None])
        assert torch.equal(made.latents([one]), expected)
        for text in ("a cat", ""):
            [row] = asked(text)
            assert torch.equal(made.prompts([row]).tokens, base.encode_prompts([text]).tokens)
    assert pixels.read == [PHOTO.sha256]


def test_rows_of_a_step_are_the_same_from_the_cache_and_without(tmp_path: Path, base: SD1):
    """All that a recipe varies, through a filled cache, against the base asked row by row."""
    photos = [
        Photo(sha256=f"{i:064x}", width=30 + 8 * i, height=64, captions=("a, b, c, d", f"e {i}"))
        for i in range(1, 5)
    ]
    captions = CaptionsSpec(dropout=0.3, shuffle_tags=True, tag_dropout=0.3, variants=4)
    recipe = Recipe(batch_size=3, captions=captions, pictures=PicturesSpec(flip=0.5), trigger="acme")
    plan, pixels = Plan(photos, recipe, Framing((32, 48), 4)), Counting()
    made = encodings(tmp_path, base, pixels)
    list(made.fill(plan.shown(), plan.captions()))
    filled = len(pixels.read)
    base_text = base.text_encoder
    for step in range(6):
        for rows in batches_of_step(plan, step):
            latents, prompts = made.latents(rows), made.prompts(rows)
            for index, row in enumerate(rows):
                part = shown_pixels(picture(row.photo), row.view)[None]
                assert torch.equal(latents[index : index + 1], base.encode_images(part))
                assert torch.equal(
                    prompts.tokens[index : index + 1], base.encode_prompts([row.caption]).tokens
                )
    assert base.text_encoder is base_text
    assert len(pixels.read) == filled == 4 * 2 * 2  # photos, sides, both ways round


def test_sizes_are_those_of_each_row(tmp_path: Path, base: SD1):
    wide = PHOTO.model_copy(update={"width": 300, "height": 32})
    rows = [held_out_row(wide, Recipe(), FRAMING), *asked("x")]
    size = encodings(tmp_path, base).prompts(rows).size
    assert size is not None
    assert size.tolist() == [list(row.size) for row in rows]
    assert size[0].tolist() == [32, 300, 0, (150 - 64) // 2, 16, 64]


# ------------------------------------------------------------------ what a name hangs on


def changed(base: SD1, part: str) -> SD1:
    """The same base with one weight of one part changed."""
    other = copy.copy(base)
    module: nn.Module = copy.deepcopy(getattr(base, part))
    with torch.no_grad():
        next(module.parameters()).flatten()[0] += 1e-3
    setattr(other, part, module)
    if part == "unet":
        other.denoiser = other.unet
    if part == "text_encoder":
        other.towers = {"text_encoder": other.text_encoder}
    other.sha256 = "0" * 64
    return other


@pytest.mark.parametrize(
    ("part", "pictures", "texts"), [("vae", 1, 0), ("text_encoder", 0, 1), ("unet", 0, 0)]
)
def test_a_changed_part_of_the_base_remakes_only_what_it_encodes(
    tmp_path: Path, base: SD1, part: str, pictures: int, texts: int
):
    list(encodings(tmp_path, base).fill([shown()], ["a cat"]))
    before = counts(tmp_path)
    list(encodings(tmp_path, changed(base, part)).fill([shown()], ["a cat"]))
    after = counts(tmp_path)
    assert [after[kind] - before[kind] for kind in ("latents", "prompts")] == [pictures, texts]


def test_a_changed_picture_is_encoded_anew_and_an_unchanged_one_never(tmp_path: Path, base: SD1):
    pixels = Counting()
    photos = [PHOTO.model_copy(update={"sha256": f"{i:064x}"}) for i in range(4)]
    list(encodings(tmp_path, base, pixels).fill([shown(photo) for photo in photos], []))
    photos[2] = photos[2].model_copy(update={"sha256": "f" * 64, "captions": ("other",), "weight": 2.0})
    photos[1] = photos[1].model_copy(update={"source": "elsewhere.png", "captions": ("renamed",)})
    pixels.read.clear()
    list(encodings(tmp_path, base, pixels).fill([shown(photo) for photo in photos], []))
    assert pixels.read == ["f" * 64]


def test_another_cut_of_a_picture_is_another_entry(tmp_path: Path, base: SD1):
    pixels, made = Counting(), None
    ways = [
        shown(),
        Shown(PHOTO, shown().view.mirrored()),
        shown(framing=Framing((16,), 4)),
        shown(framing=Framing((32,), 8)),
        shown(framing=Framing((32,), 4, buckets=False)),
    ]
    for _ in range(2):
        made = encodings(tmp_path, base, pixels)
        list(made.fill(ways, []))
    assert made is not None
    assert len(pixels.read) == len(ways) == counts(tmp_path)["latents"]
    assert not torch.equal(made.latents([ways[0]]), made.latents([ways[1]]))


def test_another_tokenizer_makes_other_prompts(tmp_path: Path, base: SD1):
    encodings(tmp_path, base).prompts(asked("a cat"))
    other, tokenizer = copy.copy(base), copy.deepcopy(base.tokenizers["text_encoder"])
    tokenizer.add_tokens(["zebra"])
    other.tokenizers = {"text_encoder": tokenizer}
    encodings(tmp_path, other).prompts(asked("a cat"))
    assert counts(tmp_path)["prompts"] == 2


def test_prompts_are_never_cached_while_the_towers_train(tmp_path: Path):
    own = SD1.tiny()
    made = encodings(tmp_path, own, towers_train=True)
    assert list(made.fill([], ["a cat"])) == []
    own.text_encoder.requires_grad_(True)
    prompts = made.prompts(asked("a cat"))
    assert prompts.tokens.requires_grad
    assert prompts.size is not None
    assert not list(tmp_path.rglob("*.safetensors"))


def test_fill_reports_each_item_and_looks_at_none_that_is_there(tmp_path: Path, base: SD1):
    for reads in (1, 0):
        pixels = Counting()
        events = list(encodings(tmp_path, base, pixels).fill([shown()], ["a", "b"]))
        assert [(e.stage, e.done, e.total) for e in events] == [
            ("encode pictures", 1, 1),
            ("encode captions", 1, 2),
            ("encode captions", 2, 2),
        ]
        assert len(pixels.read) == reads


def test_an_entry_that_went_is_remade_to_the_same_bits(tmp_path: Path, base: SD1):
    first = encodings(tmp_path, base).latents([shown()])
    made = encodings(tmp_path, base)
    list(made.fill([shown()], []))
    for path in tmp_path.rglob("*.safetensors"):
        path.unlink()
    assert torch.equal(made.latents([shown()]), first)


def test_an_entry_made_within_a_step_has_the_bits_of_one_made_before(tmp_path: Path, base: SD1):
    before = encodings(tmp_path / "before", base)
    within = encodings(tmp_path / "within", base)
    before.prompts(asked("a cat"))
    with torch.autocast("cpu", torch.bfloat16):
        assert not torch.equal(base.encode_prompts(["a cat"]).tokens, before.prompts(asked("a cat")).tokens)
        latents, tokens = within.latents([shown()]), within.prompts(asked("a cat")).tokens
    assert torch.equal(latents, before.latents([shown()]))
    assert torch.equal(tokens, before.prompts(asked("a cat")).tokens)
    assert latents.dtype == tokens.dtype == torch.float32


def test_what_a_limit_has_no_room_for_is_counted_and_read_all_the_same(tmp_path: Path, base: SD1):
    photos = [PHOTO.model_copy(update={"sha256": f"{i:064x}"}) for i in range(20)]
    ways = [shown(photo) for photo in photos]
    roomy = encodings(tmp_path / "roomy", base)
    list(roomy.fill(ways, ["a", "b"]))
    assert roomy.lacking(ways, ["a", "b", "not asked for"]) == 0  # nothing had to go: it does not look
    set_limit(tmp_path / "tight", look(tmp_path / "roomy").bytes // 2)
    tight = encodings(tmp_path / "tight", base)
    list(tight.fill(ways, ["a", "b"]))
    assert 10 <= tight.lacking(ways, ["a", "b"]) <= 14
    assert torch.equal(tight.latents(ways), roomy.latents(ways))


# ------------------------------------------------------------------ masks

MASKED = PHOTO.model_copy(update={"mask": "2" * 64})


def test_masks_are_read_by_their_hash_and_what_is_outside_counts_less(tmp_path: Path, base: SD1):
    made = encodings(tmp_path, base, masks="loss", unmasked_weight=0.25)
    rows = [shown(MASKED), shown()]
    masks = made.masks(rows)
    assert masks is not None
    assert masks.shape == (2, 1, *made.latents(rows).shape[2:])
    expected = shown_mask(picture(MASKED.model_copy(update={"sha256": "2" * 64})), rows[0].view, 2)
    assert torch.allclose(masks[0], 0.25 + 0.75 * expected)
    assert masks[1].eq(1).all()
    assert 0.25 < float(masks[0].min()) < float(masks[0].max()) < 1


def test_there_are_no_masks_where_none_counts(tmp_path: Path, base: SD1):
    assert encodings(tmp_path, base).masks([shown(MASKED)]) is None
    assert encodings(tmp_path, base, masks="loss").masks([shown()]) is None


def test_a_changed_mask_leaves_the_latents_alone(tmp_path: Path, base: SD1):
    pixels = Counting()
    other = MASKED.model_copy(update={"mask": "3" * 64})
    for photo in (MASKED, other):
        list(encodings(tmp_path, base, pixels, masks="loss").fill([shown(photo)], []))
    assert pixels.read == [PHOTO.sha256, "2" * 64, "3" * 64]
    assert counts(tmp_path) == {"latents": 1, "masks": 2, "prompts": 0}


def counts(folder: Path) -> dict[str, int]:
    kinds = ("latents", "masks", "prompts")
    return {kind: len(list((folder / kind).rglob("*.safetensors"))) for kind in kinds}


def _never() -> dict[str, Tensor]:
    raise AssertionError("made again")


def _ones() -> dict[str, Tensor]:
    return {"x": torch.ones(3)}
