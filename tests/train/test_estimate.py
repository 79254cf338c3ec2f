"""Estimates: what a dry run counts is what a run holds; limits refuse; earlier runs correct."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from livery import plugins
from livery.models.backbone import Backbone
from livery.nouns import (
    Dataset,
    Estimate,
    FullSpec,
    LiveryError,
    LowRankSpec,
    MemorySpec,
    Note,
    Photo,
    Recipe,
    Run,
    Trained,
)
from livery.train import footprint
from livery.train.dryrun import Holdings, Size, shadow, step_work
from livery.train.estimate import Probe, compared, estimate, refuse
from livery.train.footprint import choose, looked_at, plans_for
from livery.train.loop import train
from livery.train.probe import probe
from livery.tuners.tuner import build

FAMILIES = sorted(plugins.families())
Paint = Callable[[Photo], Image.Image]
HERE = Path(__file__).parents[2]


@pytest.fixture(scope="module", params=FAMILIES)
def base(request: pytest.FixtureRequest) -> Backbone:
    return plugins.families()[request.param].tiny()


def manual(recipe: Recipe, **values: Any) -> Recipe:
    return Recipe.model_validate({**recipe.model_dump(), "memory": {"mode": "manual"}, **values})


def test_a_dry_run_counts_what_a_real_step_holds_and_changes_nothing(base: Backbone):
    attached = build(LowRankSpec(rank=2)).attach(base)
    try:
        before = {name: p.detach().clone() for name, p in attached.params.items()}
        with shadow(base) as copied:
            size = Size(2, base.resolution, base.resolution)
            counted = step_work(copied, size, "fp32", towers_train=False)
        assert all(torch.equal(p, before[name]) and p.grad is None for name, p in attached.params.items())
        side = base.resolution // base.latent.factor
        real = Holdings()
        with torch.no_grad():
            prompts = base.encode_prompts(["x", "x"])
        with real:
            clean = torch.zeros(2, base.latent.channels, side, side)
            guess = base.predict(clean, base.noise.levels(2), prompts)
            (guess - clean).square().mean().backward()
        assert counted.peak_bytes == pytest.approx(real.peak, rel=0.05)
    finally:
        attached.undo()


def test_flops_of_a_linear_layer_are_two_per_product():
    """Forward, and in the backward pass one product for the input and one for the weight."""
    from torch.utils.flop_counter import FlopCounterMode

    layer, x = torch.nn.Linear(8, 16), torch.randn(4, 8, requires_grad=True)
    with FlopCounterMode(display=False) as flops:
        layer(x).sum().backward()
    assert flops.get_total_flops() == 3 * 2 * 4 * 8 * 16


def test_plans_count_less_the_more_they_give_up(base: Backbone, recipe: Recipe, dataset: Dataset):
    with looked_at(manual(recipe, batch_size=16), base, dataset) as subject:
        plain = subject.footprint(MemorySpec(mode="manual"))
        small = subject.footprint(MemorySpec(mode="manual", weights="int8", checkpointing=True))
    assert small.lasting["weights"] < 0.8 * plain.lasting["weights"]
    # Tiny SD3 has two blocks: what is computed again is nearly all, and checkpointing gains nothing.
    assert small.passing["activations and gradients"] < 1.1 * plain.passing["activations and gradients"]
    assert plain.learned == small.learned
    assert plain.lasting["optimiser"] == 2 * plain.learned, "AdamW keeps two moments"


def test_full_fine_tuning_counts_the_copy_to_undo_from(base: Backbone, recipe: Recipe, dataset: Dataset):
    full = manual(recipe, tuners=(FullSpec(),))
    with looked_at(full, base, dataset) as subject:
        plain = subject.footprint(full.memory)
        fused = subject.footprint(MemorySpec(mode="manual", fused_backward=True))
    assert plain.learned == sum(param.nbytes for param in base.denoiser.parameters())
    assert plain.lasting["kept to undo"] == pytest.approx(plain.learned, rel=0.02)
    saved = plain.passing["activations and gradients"] - fused.passing["activations and gradients"]
    assert saved >= 0, "gradients do not live together"


# ---------------------------------------------------------------------------- auto


def test_auto_is_plain_where_memory_is_plenty_and_says_what_it_takes_where_it_is_not(
    recipe: Recipe, dataset: Dataset, monkeypatch: pytest.MonkeyPatch
):
    base = plugins.families()["sd1"].tiny()
    monkeypatch.setattr(footprint, "free_memory_bytes", lambda _: 1 << 40)
    assert choose(recipe, base, dataset) == (MemorySpec(mode="manual"), "")
    held = footprint._held(base)  # pyright: ignore[reportPrivateUsage]
    monkeypatch.setattr(footprint, "_held", lambda _: held)
    monkeypatch.setattr(footprint, "resident_bytes", lambda: held)
    with looked_at(recipe, base, dataset) as subject:
        plans = list(plans_for(recipe, base))
        needed = [subject.footprint(plan).peak - held for plan in plans]
    assert [plan.weights for plan in plans] == ["fp32", "fp32", "int8", "int4"]
    assert needed[0] > needed[1]
    room = (needed[0] + needed[1]) / 2 / footprint.ROOM
    monkeypatch.setattr(footprint, "free_memory_bytes", lambda _: int(room))
    plan, why = choose(recipe, base, dataset)
    assert plan == MemorySpec(mode="manual", checkpointing=True)
    assert why.startswith("Memory: frozen weights in fp32, activations recomputed, the fastest that fits")
    monkeypatch.setattr(footprint, "free_memory_bytes", lambda _: 1)
    plan, why = choose(recipe, base, dataset)
    assert plan == plans[needed.index(min(needed))]
    assert "may not fit" in why


def test_plans_that_the_recipe_contradicts_are_left_out(recipe: Recipe):
    base = plugins.families()["sd1"].tiny()
    full = Recipe.model_validate({**recipe.model_dump(), "tuners": (FullSpec(),)})
    assert {plan.weights for plan in plans_for(full, base)} == {"fp32"}
    assert any(plan.fused_backward for plan in plans_for(full, base))


def test_a_run_keeps_its_plan_when_it_goes_on(
    recipe: Recipe, dataset: Dataset, pixels: Paint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The plan is chosen at the start; a resumed run does not look at what is free today."""
    base = plugins.families()["sd1"].tiny()
    plan, asked = MemorySpec(mode="manual", checkpointing=True), []

    def chosen(*_: Any) -> tuple[MemorySpec, str]:
        asked.append(1)
        return plan, "because"

    monkeypatch.setattr("livery.train.loop.choose", chosen)
    stop: list[bool] = []
    events = []
    for event in train(recipe, base, dataset, pixels=pixels, folder=tmp_path, should_stop=lambda: bool(stop)):
        events.append(event)
        if event.kind == "step":
            stop.append(True)
    assert Note(text="because") in events
    *_, last = train(recipe, base, dataset, pixels=pixels, folder=tmp_path)
    assert isinstance(last, Trained)
    assert asked == [1]
    kept = json.loads((tmp_path / "choices.json").read_text())
    assert MemorySpec.model_validate(kept["memory"]) == plan


# ---------------------------------------------------------------------------- the numbers


@pytest.fixture(scope="module")
def found() -> Estimate:
    base = plugins.families()["sd1"].tiny()
    photos = tuple(
        Photo(sha256=f"{i:064x}", width=32, height=32, captions=("x",), split="train") for i in range(4)
    )
    recipe = Recipe(steps=10, batch_size=2, memory=MemorySpec(mode="manual"))
    return estimate(recipe, base, Dataset(name="four", photos=photos), price_per_hour=2.0)


def run_of(found: Estimate, memory: float, time: float) -> Run:
    return Run(
        recipe=Recipe(),
        dataset=found.dataset,
        base_sha256="0" * 64,
        adapter="0" * 64,
        steps=(),
        validations=(),
        seconds=found.formula_seconds * time,
        peak_memory_bytes=round(found.formula_bytes * memory),
        device=found.device,
    )


def test_money_and_energy_follow_from_time(found: Estimate):
    assert found.seconds >= 10 * found.step_seconds
    assert found.cost == pytest.approx(2.0 * found.seconds / 3600)
    assert found.kilowatt_hours == pytest.approx(0.1 * found.seconds / 3600)
    assert "assumed" in found.watts_from
    assert found.disk_bytes > 4 * 16 * 16 * 4 * 4


def test_earlier_runs_of_the_kind_correct_the_next_estimate_and_others_do_not(found: Estimate):
    base = plugins.families()["sd1"].tiny()
    photos = tuple(
        Photo(sha256=f"{i:064x}", width=32, height=32, captions=("x",), split="train") for i in range(4)
    )
    recipe = Recipe(steps=10, batch_size=2, memory=MemorySpec(mode="manual"))
    data = Dataset(name="four", photos=photos)
    other = found.model_copy(update={"method": "full"})
    earlier = [(other, run_of(found, 9, 9)), *((found, run_of(found, 1.2, by)) for by in (3.0, 2.0, 8.0))]
    next_one = estimate(recipe, base, data, earlier=earlier, price_per_hour=2.0)
    assert next_one.earlier_runs == 3
    assert next_one.peak_memory_bytes == pytest.approx(1.2 * next_one.formula_bytes, rel=1e-6)
    assert next_one.seconds == pytest.approx(3.0 * next_one.formula_seconds, rel=1e-6)
    measured = estimate(recipe, base, data, probe=Probe(20, 0.5, 123_000_000))
    assert measured.step_seconds == 0.5
    assert measured.peak_memory_bytes == 123_000_000


def test_limits_refuse_before_the_run(found: Estimate):
    hour = found.model_copy(update={"seconds": 3600.0, "cost": 2.0})
    refuse(hour, max_hours=1.1, max_cost=2.1)
    with pytest.raises(LiveryError, match=r"about 1 hours, --max-hours allows 0\.5"):
        refuse(hour, max_hours=0.5, max_cost=None)
    with pytest.raises(LiveryError, match=r"cost about 2\.00, --max-cost allows 1\b"):
        refuse(hour, max_hours=None, max_cost=1)
    with pytest.raises(LiveryError, match="needs a price"):
        refuse(hour.model_copy(update={"cost": None}), max_hours=None, max_cost=1)


def test_estimated_and_measured_are_told_side_by_side(found: Estimate):
    assert "(+100%)" in compared(found, run_of(found, 1.0, 2.0 * found.seconds / found.formula_seconds))


def test_a_probe_measures_warm_steps_and_leaves_nothing_but_the_cache(
    recipe: Recipe, dataset: Dataset, pixels: Paint, tmp_path: Path
):
    base = plugins.families()["sd1"].tiny()
    *events, measured = probe(recipe, base, dataset, pixels, tmp_path, steps=4)
    assert isinstance(measured, Probe)
    assert measured.steps == 4
    assert measured.step_seconds > 0
    assert measured.peak_memory_bytes > 50e6
    assert {event.kind for event in events if not isinstance(event, Probe)} <= {"progress"}


ONE_RUN = """
import sys, tempfile
from pathlib import Path
from PIL import Image
from livery import plugins
from livery.nouns import *
from livery.train.loop import train
from livery.train.estimate import estimate
base = plugins.families()[sys.argv[1]].tiny()
side = base.resolution
photos = tuple(
    Photo(sha256=f"{i:064x}", width=side, height=side, captions=(f"a {i}",), split="train") for i in range(8)
)
recipe = Recipe(
    steps=6, batch_size=8, precision="fp32", validate_every=0, checkpoint_every=3, learning_rate=1e-4,
    memory=MemorySpec(mode="manual"), stop=StopSpec(check_effect_at=0, keep="last"),
    tuners=(FullSpec() if sys.argv[2] == "full" else LowRankSpec(rank=16),),
)
data = Dataset(name="x", photos=photos)
if sys.argv[3] == "estimate":
    found = estimate(recipe, base, data)
    print(found.peak_memory_bytes, found.memory_parts["process"])
else:
    paint = lambda photo: Image.new("RGB", (photo.width, photo.height), "red")
    *_, last = train(recipe, base, data, pixels=paint, folder=Path(tempfile.mkdtemp()))
    print(last.run.peak_memory_bytes, 0)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="libraries are counted as on Linux")
@pytest.mark.parametrize(("family", "kind"), [("sd1", "lora"), ("sd1", "full"), ("sd3", "lora")])
def test_the_estimated_peak_is_within_15_percent_of_the_measured_one(family: str, kind: str):
    """Each in a process of its own, as a user has it: the maximum resident set counts."""
    if family not in FAMILIES:
        pytest.skip(f"no family {family}")

    def number(what: str) -> int:
        command = [sys.executable, "-c", ONE_RUN, family, kind, what]
        out = subprocess.run(command, capture_output=True, text=True, check=True, cwd=HERE).stdout
        return int(out.split()[-2])

    assert number("estimate") == pytest.approx(number("run"), rel=0.15)
