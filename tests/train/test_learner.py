"""One step against the same step written out by hand; what it leaves alone."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.training_utils import compute_snr
from PIL import Image
from torch import Tensor

from livery.models.sd1 import SD1
from livery.nouns import Dataset, LiveryError, Photo, Recipe
from livery.train.batches import Plan, batches_of_step
from livery.train.buckets import Framing
from livery.train.cache import Encodings, TensorCache
from livery.train.effect import beginning, measure, require
from livery.train.learner import Learner
from livery.tuners.tuner import attach_all, build, touched

Paint = Callable[[Photo], Image.Image]


@pytest.fixture(scope="module")
def base() -> SD1:
    return SD1.tiny()


@pytest.fixture
def make(base: SD1, dataset: Dataset, pixels: Paint, tmp_path: Path, request: pytest.FixtureRequest) -> Any:
    """A learner for a recipe with these values; detached after the test."""

    def made(**values: Any) -> Learner:
        recipe = Recipe.model_validate(
            {
                "tuners": [{"rank": 2}],
                "steps": 8,
                "batch_size": 3,
                "learning_rate": 1e-2,
                "precision": "fp32",
                "optimizer": {"warmup_steps": 1},
                **values,
            }
        )
        tuners = [build(spec) for spec in recipe.tuners]
        encodings = Encodings(
            base,
            TensorCache(tmp_path / "cache"),
            pixels,
            recipe.pictures,
            towers_train="towers" in touched(tuners),
        )
        plan = Plan(dataset.split("train"), recipe, Framing.of(recipe, base))
        attached = attach_all(tuners, base, recipe.seed)
        request.addfinalizer(attached.undo)
        return Learner(recipe, base, attached, plan, encodings)

    return made


def moved(learner: Learner, steps: int) -> dict[str, Tensor]:
    for step in range(steps):
        learner.step(step)
    return learner.attached.state()


def test_the_loss_of_a_step_is_the_one_of_diffusers_trainer(make: Any, base: SD1):
    """The formulas of train_text_to_image.py with min-SNR, on the same rows and random numbers."""
    learner = make(captions={"dropout": 0.5})
    (rows,) = batches_of_step(learner.plan, 0)
    errors: list[float] = []
    scheduler = base.pipeline().scheduler
    for row in rows:
        clean = learner.encodings.latents([row])
        t = torch.randint(1000, (1,), generator=row.random)
        noise = torch.randn(clean.shape[1:], generator=row.random)[None]
        noisy = scheduler.add_noise(clean, noise, t)
        with torch.no_grad():
            prediction = base.predict(noisy, t, base.encode_prompts([row.caption]))
        snr = float(compute_snr(scheduler, t))
        errors.append(float((prediction - noise).square().mean()) * min(snr, 5.0) / snr * row.weight)
    assert learner.step(0).loss == pytest.approx(sum(errors) / len(rows), rel=1e-3)


def test_the_next_steps_rows_are_read_ahead_and_are_the_same(make: Any):
    one = make()
    ahead = moved(one, 3)
    one.attached.undo()
    other = make()
    for step in range(3):
        other._ahead = None
        other.step(step)
    assert all(torch.equal(ahead[name], tensor) for name, tensor in other.attached.state().items())


def test_dropout_repeats_with_the_step_and_moves_nobodys_random_numbers(make: Any):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    one = make(tuners=[{"rank": 2, "dropout": 0.5}])
    first = moved(one, 2)
    assert torch.equal(torch.get_rng_state(), before)
    one.attached.undo()
    torch.manual_seed(99)
    other = make(tuners=[{"rank": 2, "dropout": 0.5}])
    assert all(torch.equal(first[name], tensor) for name, tensor in moved(other, 2).items())
    other.attached.undo()
    without = moved(make(), 2)
    assert not all(torch.equal(first[name], tensor) for name, tensor in without.items())


def test_nothing_drops_out_while_looking(make: Any, base: SD1):
    learner = make(tuners=[{"rank": 2, "dropout": 0.5}])
    moved(learner, 3)
    inputs = torch.randn(1, 4, 16, 16), torch.tensor([500]), base.encode_prompts(["x"])
    with torch.no_grad(), learner.looking():
        assert torch.equal(base.predict(*inputs), base.predict(*inputs))
    with torch.no_grad():
        assert not torch.equal(base.predict(*inputs), base.predict(*inputs))


@pytest.mark.parametrize("spec", [{"rank": 2}, {"kind": "full", "learning_rate": 1e-3}])
def test_rows_that_keep_the_base_aim_at_its_own_answer(make: Any, base: SD1, spec: dict[str, Any]):
    """Also after steps that moved what is trained, for the base is asked with nothing attached."""
    rows_of = lambda learner, step: next(iter(batches_of_step(learner.plan, step)))  # noqa: E731
    learner = make(tuners=[spec], batch_size=4, prior={"kind": "prediction", "prompt": "a colour"})
    moved(learner, 3)
    batch = learner._prepare(3)[0]
    noisy = learner.law.mix(batch.clean, batch.mixed, batch.t)
    target = learner._target(batch, noisy)
    kept = [place for place, row in enumerate(rows_of(learner, 3)) if row.keeps_base]
    assert kept == [1, 3]
    learner.attached.undo()
    with torch.no_grad():
        plain = base.predict(noisy[kept], batch.t[kept], base.encode_prompts(["a colour"] * 2))
    assert torch.equal(target[kept], plain)
    others = [place for place in range(4) if place not in kept]
    assert torch.equal(target[others], batch.noise[others])


def test_a_running_mean_is_what_is_saved_and_looked_at(make: Any):
    learner = make(optimizer={"ema": 0.9, "warmup_steps": 1})
    raw = moved(learner, 4)
    saved = learner.adapter()
    assert raw.keys() == saved.keys()
    assert not all(torch.equal(raw[name], saved[name]) for name in raw)
    assert all(torch.equal(saved[name], tensor) for name, tensor in learner._ema.state().items())
    assert all(torch.equal(raw[name], tensor) for name, tensor in learner.attached.state().items())


def test_fused_backward_trains_as_one_update_behind_the_backward_pass(make: Any):
    """Equal where no gradient is clipped, as clipping is per weight there."""

    def trained(fused: bool) -> dict[str, Tensor]:
        learner = make(
            tuners=[{"kind": "full"}],
            learning_rate=1e-4,
            memory={"mode": "manual", "fused_backward": fused},
            optimizer={"clip_norm": 1e6, "warmup_steps": 1},
        )
        state = moved(learner, 2)
        learner.attached.undo()
        return state

    one, other = trained(False), trained(True)
    assert all(torch.allclose(tensor, other[name], atol=1e-6) for name, tensor in one.items())


def test_scaled_losses_for_fp16_train_as_plain_ones_and_an_overflow_skips_a_step(
    make: Any, monkeypatch: pytest.MonkeyPatch
):
    """The arithmetic stays fp32 here, as no CPU has fp16: what is shown is that the scale cancels out."""
    plain = make()
    wanted = moved(plain, 3)
    plain.attached.undo()
    monkeypatch.setattr("livery.train.learner.resolve", lambda *_: "fp16")
    scaled = make()
    moved(scaled, 2)
    stored = scaled.state()
    assert float(stored["scaler/scale"]) == 2**16
    scaled.step(2)
    found = scaled.attached.state()
    assert all(torch.allclose(wanted[name], tensor, rtol=1e-4, atol=1e-7) for name, tensor in found.items())
    scaled.load(stored)
    hook = next(iter(scaled.params.values())).register_hook(lambda gradient: gradient * float("inf"))
    assert scaled.step(2).gradient == 0
    hook.remove()
    assert float(scaled.state()["scaler/scale"]) == 2**15
    now, before = scaled.attached.state(), {n.removeprefix("tuner/"): t for n, t in stored.items()}
    assert all(torch.equal(before[name], tensor) for name, tensor in now.items())


# ----------------------------------------------------------------------------- effect


def test_what_learns_has_an_effect_that_grows(make: Any):
    learner = make()
    start = beginning(learner.params)
    untrained = measure(learner, start)
    assert (untrained.moved, untrained.changed) == (0, 0)
    moved(learner, 2)
    early = measure(learner, start)
    for step in range(2, 8):
        learner.step(step)
    late = measure(learner, start)
    assert 0 < early.moved < late.moved
    assert 0 < early.changed < late.changed
    require(late, 8)


def test_an_adapter_that_did_not_move_is_an_error_that_names_reasons(make: Any):
    learner = make()
    with pytest.raises(LiveryError, match=r"after 5 steps nothing .* moved: check that learning_rate"):
        require(measure(learner, beginning(learner.params)), 5)


def test_new_words_that_no_caption_has_are_an_error_that_names_them(make: Any):
    learner = make(tuners=[{"kind": "tokens", "tokens": {"<acme>": "ab"}}], captions={"dropout": 0})
    start = beginning(learner.params)
    with torch.no_grad():
        for param in learner.params.values():
            param.add_(0.5)
    with pytest.raises(LiveryError, match="trigger or the new words stand in the captions"):
        require(measure(learner, start), 5)
