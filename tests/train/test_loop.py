"""The loop on the tiny SD 1.x model: it learns, tells, stops, refuses, and leaves the base as it was."""

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from livery.models.sd1 import SD1
from livery.nouns import (
    Dataset,
    Event,
    LiveryError,
    Note,
    Photo,
    Recipe,
    Sample,
    Saved,
    Step,
    Trained,
    Validation,
)
from livery.train.loop import train
from livery.tuners.adapter_file import attach_adapter, read_adapter

Paint = Callable[[Photo], Image.Image]


@pytest.fixture(scope="module")
def base() -> SD1:
    return SD1.tiny()


def weights(base: SD1) -> dict[str, torch.Tensor]:
    parts = {"vae": base.vae, **base.modules()}
    return {f"{p}.{n}": t.clone() for p, part in parts.items() for n, t in part.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(t, other[name]) for name, t in one.items())


def kind(events: Sequence[Event], wanted: type) -> list[Any]:
    return [event for event in events if isinstance(event, wanted)]


def changed(recipe: Recipe, **values: Any) -> Recipe:
    return Recipe.model_validate({**recipe.model_dump(), **values})


def test_a_run_tells_its_steps_looks_checkpoints_and_result(
    recipe: Recipe, base: SD1, dataset: Dataset, pixels: Paint, tmp_path: Path
):
    before = weights(base)
    events = list(train(recipe, base, dataset, pixels=pixels, folder=tmp_path))
    assert [step.step for step in kind(events, Step)] == [1, 2, 3, 4]
    assert [look.step for look in kind(events, Validation)] == [0, 2, 4]
    assert [saved.step for saved in kind(events, Saved)] == [2, 4]
    assert isinstance(events[-1], Trained)
    run, adapter = events[-1].run, events[-1].adapter
    assert run.steps == tuple(kind(events, Step))
    assert run.validations == tuple(kind(events, Validation))
    assert run.adapter == adapter.id
    assert run.seconds > 0
    assert run.peak_memory_bytes > 50e6
    assert same(before, weights(base))
    assert not any(p.requires_grad for part in base.modules().values() for p in part.parameters())


def test_the_adapter_file_has_a_true_card_and_is_what_was_told(
    recipe: Recipe, base: SD1, dataset: Dataset, pixels: Paint, tmp_path: Path
):
    blobs: list[bytes] = []

    def put_blob(content: bytes) -> str:
        blobs.append(content)
        return hashlib.sha256(content).hexdigest()

    *_, last = train(recipe, base, dataset, pixels=pixels, folder=tmp_path, put_blob=put_blob)
    assert isinstance(last, Trained)
    adapter, tensors = read_adapter(tmp_path / "adapter.safetensors")
    assert adapter == last.adapter
    assert blobs == [(tmp_path / "adapter.safetensors").read_bytes()]
    card = adapter.card
    assert (card.recipe, card.dataset, card.base_sha256) == (recipe, dataset.id, base.sha256)
    assert (card.step, card.trigger_words, card.licences) == (4, ("acme style",), ("CC0-1.0",))
    assert any(tensor.abs().max() > 0 for name, tensor in tensors.items() if "lora_B" in name)


def test_it_learns_and_the_file_holds_what_was_learnt(
    recipe: Recipe, base: SD1, dataset: Dataset, pixels: Paint, tmp_path: Path
):
    """Held-out loss falls on photos of the same kind, and the file attached again gives the tuned output."""
    longer = changed(recipe, steps=40, batch_size=4, validate_every=40, checkpoint_every=40)
    events = list(train(longer, base, dataset, pixels=pixels, folder=tmp_path))
    first, last = (look.loss for look in kind(events, Validation))
    assert last < 0.9 * first
    noisy, t, prompts = torch.randn(1, 4, 16, 16), torch.tensor([500]), base.encode_prompts(["x"])
    plain = base.predict(noisy, t, prompts)
    attached = attach_adapter(base, tmp_path / "adapter.safetensors")
    tuned = base.predict(noisy, t, prompts)
    attached.undo()
    assert (tuned - plain).abs().max() > 0.01
    assert torch.equal(base.predict(noisy, t, prompts), plain)


def test_the_same_recipe_gives_the_same_bytes_and_another_seed_others(
    recipe: Recipe, base: SD1, dataset: Dataset, pixels: Paint, tmp_path: Path
):
    def content(name: str, seed: int) -> bytes:
        torch.manual_seed(torch.seed() % 1000)  # torch's own random state must not matter
        cut = changed(recipe, steps=2, seed=seed, validate_every=0)
        list(train(cut, base, dataset, pixels=pixels, folder=tmp_path / name, cache=tmp_path / "cache"))
        return (tmp_path / name / "adapter.safetensors").read_bytes()

    assert content("a", 0) == content("b", 0)
    assert content("c", 1) != content("b", 0)


def test_accumulated_batches_step_as_one_large_batch(
    recipe: Recipe, base: SD1, dataset: Dataset, pixels: Paint, tmp_path: Path
):
    """Photos of unequal weight, six rows: cut in three the losses and weights agree to rounding."""

    def told(name: str, **cut: int) -> tuple[list[float], dict[str, torch.Tensor]]:
        one = changed(recipe, steps=2, validate_every=0, **cut)
        events = list(train(one, base, dataset, pixels=pixels, folder=tmp_path / name))
        return [s.loss for s in kind(events, Step)], read_adapter(tmp_path / name / "adapter.safetensors")[1]

    losses, tensors = told("whole", batch_size=6, accumulate=1)
    cut_losses, cut_tensors = told("cut", batch_size=2, accumulate=3)
    assert losses == pytest.approx(cut_losses, rel=1e-5)
    assert all(torch.allclose(tensors[n], cut_tensors[n], atol=1e-4) for n in tensors)


def test_the_loss_of_a_step_is_the_formula_written_out(
    recipe: Recipe, base: SD1, dataset: Dataset, pixels: Paint, tmp_path: Path
):
    """Of the first step, where the adapter is a no-op: error times min(snr, 5) / snr times photo weight."""
    from livery.train.batches import Plan, batches_of_step
    from livery.train.buckets import Framing, cover, shown_pixels

    [step, *_] = kind(list(train(recipe, base, dataset, pixels=pixels, folder=tmp_path)), Step)
    levels = torch.linspace(0.00085**0.5, 0.012**0.5, 1000).square()
    alpha_bar = torch.cumprod(1 - levels, 0)
    total = 0.0
    for row in next(batches_of_step(Plan(dataset.split("train"), recipe, Framing.of(recipe, base)), 0)):
        image = pixels(row.photo)
        square = cover(*image.size, (32, 32), keep_top=False)
        clean = base.encode_images(shown_pixels(image, square)[None])
        t = torch.randint(1000, (1,), generator=row.random)
        noise = torch.randn(1, 4, 16, 16, generator=row.random)
        signal = float(alpha_bar[t])
        noisy = math.sqrt(signal) * clean + math.sqrt(1 - signal) * noise
        answer = base.predict(noisy, t, base.encode_prompts([row.caption]))
        snr = signal / (1 - signal)
        total += row.photo.weight * min(snr, 5) / snr * float((answer - noise).square().mean())
    assert step.loss == pytest.approx(total / 2, rel=1e-4)


def test_validation_is_the_same_whatever_seed_or_batch_size(
    recipe: Recipe, base: SD1, dataset: Dataset, pixels: Paint, tmp_path: Path
):
    def untrained(name: str, **values: int) -> float:
        one = changed(recipe, steps=1, **values)
        [first, *_] = kind(list(train(one, base, dataset, pixels=pixels, folder=tmp_path / name)), Validation)
        assert first.step == 0
        return first.loss

    assert untrained("a", seed=0, batch_size=2) == pytest.approx(
        untrained("b", seed=9, batch_size=5), rel=1e-5
    )


def test_samples_are_drawn_with_fixed_seeds_and_kept(
    recipe: Recipe, base: SD1, dataset: Dataset, pixels: Paint, tmp_path: Path
):
    asked: list[tuple[list[str], list[int]]] = []

    def draw(prompts: Sequence[str], seeds: Sequence[int]) -> Iterator[Image.Image]:
        asked.append((list(prompts), list(seeds)))
        return (Image.linear_gradient("L").point(lambda v, s=seed: v + s + len(asked)) for seed in seeds)

    sampled = changed(recipe, sample_every=2, sample_prompts=("a cat", "a dog"))
    events = list(train(sampled, base, dataset, pixels=pixels, folder=tmp_path, draw=draw))
    assert asked == [(["a cat, acme style", "a dog, acme style"], [0, 1])] * 3
    samples = kind(events, Sample)
    assert [(s.step, s.prompt) for s in samples[:2]] == [(0, "a cat, acme style"), (0, "a dog, acme style")]
    files = {hashlib.sha256(path.read_bytes()).hexdigest() for path in (tmp_path / "samples").iterdir()}
    assert files == {sample.sha256 for sample in samples}
    assert events[-1].run.samples == tuple(samples)  # type: ignore[union-attr]


@pytest.mark.parametrize("way", ["should_stop", "interrupt", "close"])
def test_stopped_in_any_way_it_saves_and_goes_on_to_the_same_bytes(
    way: str, recipe: Recipe, base: SD1, dataset: Dataset, pixels: Paint, tmp_path: Path
):
    """At step 3, where no checkpoint is due; the folder of the unbroken run stands beside."""
    list(train(recipe, base, dataset, pixels=pixels, folder=tmp_path / "whole"))
    folder, seen, before = tmp_path / "cut", [], weights(base)
    events = train(
        recipe,
        base,
        dataset,
        pixels=pixels,
        folder=folder,
        should_stop=lambda: way == "should_stop" and len(kind(seen, Step)) == 3,
    )
    for event in events:
        seen.append(event)
        if way != "should_stop" and len(kind(seen, Step)) == 3:
            break
    if way == "interrupt":
        with pytest.raises(KeyboardInterrupt):
            events.throw(KeyboardInterrupt())  # type: ignore[attr-defined]
    elif way == "close":
        events.close()  # type: ignore[attr-defined]
    else:
        assert kind(seen, Saved)[-1].step == 3
        assert not kind(seen, Trained)
    assert (folder / "step-00000003.safetensors").is_file()
    assert same(before, weights(base))
    rest = list(train(recipe, base, dataset, pixels=pixels, folder=folder))
    assert [step.step for step in kind(rest, Step)] == [4]
    assert (folder / "adapter.safetensors").read_bytes() == (
        tmp_path / "whole/adapter.safetensors"
    ).read_bytes()
    assert len(rest[-1].run.steps) == 4  # type: ignore[union-attr]


def test_stopped_while_encoding_it_says_so_and_attaches_nothing(
    recipe: Recipe, base: SD1, dataset: Dataset, pixels: Paint, tmp_path: Path
):
    events = list(train(recipe, base, dataset, pixels=pixels, folder=tmp_path, should_stop=lambda: True))
    assert [event.kind for event in events if getattr(event, "level", "") != "warning"] == [
        "progress",
        "note",
    ]
    assert not list(tmp_path.glob("step-*"))


def test_without_resume_it_starts_anew_and_another_recipe_is_refused(
    recipe: Recipe, base: SD1, dataset: Dataset, pixels: Paint, tmp_path: Path
):
    other = changed(recipe, learning_rate=0.5)
    list(train(recipe, base, dataset, pixels=pixels, folder=tmp_path))
    with pytest.raises(LiveryError, match="another recipe"):
        list(train(other, base, dataset, pixels=pixels, folder=tmp_path))
    events = list(train(other, base, dataset, pixels=pixels, folder=tmp_path, resume=False))
    assert len(kind(events, Step)) == 4


def test_a_finished_run_ends_at_once_with_the_same_adapter(
    recipe: Recipe, base: SD1, dataset: Dataset, pixels: Paint, tmp_path: Path
):
    *_, first = train(recipe, base, dataset, pixels=pixels, folder=tmp_path)
    again = list(train(recipe, base, dataset, pixels=pixels, folder=tmp_path))
    assert not kind(again, Step)
    assert again[-1].adapter == first.adapter  # type: ignore[union-attr]


def test_a_loss_that_is_no_number_stops_with_the_step_and_a_cure(
    recipe: Recipe,
    base: SD1,
    dataset: Dataset,
    pixels: Paint,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    calls, predict, before = [], base.predict, weights(base)

    def broken(*parts: Any) -> torch.Tensor:
        calls.append(1)
        return predict(*parts) * (math.nan if len(calls) > 3 else 1)

    monkeypatch.setattr(base, "predict", broken)
    silent = changed(recipe, validate_every=0)
    with pytest.raises(LiveryError, match=r"loss became nan at step 4: .* from 0.01 to 0.003.* of step 2\."):
        list(train(silent, base, dataset, pixels=pixels, folder=tmp_path))
    assert same(before, weights(base))
    assert (tmp_path / "step-00000002.safetensors").is_file()


def test_what_cannot_work_is_refused_before_anything_is_read(
    recipe: Recipe, base: SD1, dataset: Dataset, pixels: Paint, tmp_path: Path
):
    none = dataset.model_copy(update={"photos": dataset.split("validation")})
    with pytest.raises(LiveryError, match="dataset 'colours' has no photo in its split 'train'"):
        next(train(recipe, base, none, pixels=pixels, folder=tmp_path))
    with pytest.raises(LiveryError, match="resolution 33 is not a multiple of 2"):
        next(
            train(
                changed(recipe, pictures={"buckets": False, "resolutions": (33,)}),
                base,
                dataset,
                pixels=pixels,
                folder=tmp_path,
            )
        )


def test_it_says_what_is_missing(recipe: Recipe, base: SD1, dataset: Dataset, pixels: Paint, tmp_path: Path):
    bare = tuple(photo.model_copy(update={"captions": ()}) for photo in dataset.split("train"))
    lacking = changed(recipe, steps=1, sample_every=1)
    data = dataset.model_copy(update={"photos": bare})
    events = list(train(lacking, base, data, pixels=pixels, folder=tmp_path))
    notes = " ".join(note.text for note in kind(events, Note) if note.level == "warning")
    for said in ("photos to learn from have no caption", "No photo is held out", "No samples are drawn"):
        assert said in notes
    assert not kind(events, Validation)


def test_bf16_trains_close_to_fp32(
    recipe: Recipe, base: SD1, dataset: Dataset, pixels: Paint, tmp_path: Path
):
    """Autocast is on (the losses differ) and sane (by less than 3%); weights stay fp32."""

    def losses(precision: str) -> list[float]:
        one = changed(recipe, precision=precision, validate_every=0)
        return [
            s.loss
            for s in kind(list(train(one, base, dataset, pixels=pixels, folder=tmp_path / precision)), Step)
        ]

    exact, rough = losses("fp32"), losses("bf16")
    assert exact != rough
    assert exact == pytest.approx(rough, rel=0.03)
    tensors = read_adapter(tmp_path / "bf16/adapter.safetensors")[1]
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}


def test_it_says_which_pictures_lose_much(
    recipe: Recipe, base: SD1, dataset: Dataset, pixels: Paint, tmp_path: Path
):
    long = dataset.photos[0].model_copy(update={"width": 40, "height": 400, "source": "tower.png"})
    data = dataset.model_copy(update={"photos": (long, *dataset.photos[1:])})

    def warned(**pictures: object) -> list[str]:
        one = changed(recipe, steps=1, validate_every=0, pictures=pictures)
        events = train(one, base, data, pixels=pixels, folder=tmp_path / str(pictures))
        return [note.text for note in kind(list(events), Note) if "is cut off" in note.text]

    [squares] = warned(buckets=False)
    assert "More than 15% is cut off 5 of 5 pictures, most off tower.png, 90%" in squares
    assert "set pictures.buckets to true" in squares
    [buckets] = warned(buckets=True)
    assert "More than 15% is cut off 1 of 5 pictures, most off tower.png, 60%" in buckets
    assert "raise pictures.max_ratio" in buckets
    assert warned(buckets=True, max_ratio=10) == []
