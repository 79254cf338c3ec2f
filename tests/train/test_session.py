"""When a run stops, which step it ends with, and what it does when it goes wrong: on scripted curves."""

import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from livery.models.sd1 import SD1
from livery.nouns import Dataset, Event, LiveryError, Note, Photo, Recipe, Run, Step, Trained, Validation
from livery.train import checkpoint, session
from livery.train.loop import train
from livery.tuners.adapter_file import read_adapter

Paint = Callable[[Photo], Image.Image]
HELD_OUT = [1.0, 0.8, 0.6, 0.7, 0.61, 0.9, 0.95]
"""After 0, 1, 2, ... steps; on training photos half of it."""


@pytest.fixture(scope="module")
def base() -> SD1:
    return SD1.tiny()


@pytest.fixture
def go(
    base: SD1, dataset: Dataset, pixels: Paint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., list[Event]]:
    """Run a recipe of six steps with the scripted curve; the folder is `run`."""

    def run(curve: Sequence[float] = HELD_OUT, name: str = "run", **values: Any) -> list[Event]:
        told = values.pop("events", None)
        more = {key: values.pop(key) for key in ("score", "draw", "clock", "should_stop") if key in values}
        calls = scripted_from(curve, values.pop("first", 0))
        monkeypatch.setattr(session, "grid_loss", calls)
        recipe = Recipe.model_validate(
            {
                "tuners": [{"rank": 2}],
                "steps": 6,
                "batch_size": 1,
                "learning_rate": 1e-2,
                "precision": "fp32",
                "validate_every": 1,
                "checkpoint_every": 1,
                "optimizer": {"warmup_steps": 1},
                **values,
            }
        )
        events = train(
            recipe, base, dataset, pixels=pixels, folder=tmp_path / name, cache=tmp_path / "cache", **more
        )
        if told is None:
            return list(events)
        told.extend(events)
        return told

    def scripted_from(curve: Sequence[float], first: int) -> Callable[..., float]:
        looks = [2 * first]

        def grid_loss(*parts: Any) -> float:
            trained = parts[2].rows[0].photo.split == "train"
            looks[0] += 1
            return curve[(looks[0] - 1) // 2] * (0.5 if trained else 1)

        return grid_loss

    return run


def record(events: Sequence[Event]) -> Run:
    assert isinstance(events[-1], Trained)
    return events[-1].run


def of(events: Sequence[Event], kind: type) -> list[Any]:
    return [event for event in events if isinstance(event, kind)]


def test_it_ends_with_the_step_of_the_lowest_held_out_loss(go: Callable[..., list[Event]], tmp_path: Path):
    events = go()
    run = record(events)
    assert (run.chosen_step, len(run.steps)) == (2, 6)
    assert [(look.loss, look.train) for look in run.validations] == [(x, x / 2) for x in HELD_OUT]
    adapter, tensors = read_adapter(tmp_path / "run/adapter.safetensors")
    assert events[-1].adapter == adapter  # type: ignore[union-attr]
    assert adapter.card.step == 2
    short = record(go(name="short", steps=6, stop={"keep": "last"}))
    assert short.chosen_step == 6
    assert "kept step 2, which has the lowest held-out loss (-40% against the base" in run.ended
    assert of(events, Note)[-1].text == run.ended
    last = read_adapter(tmp_path / "short/adapter.safetensors")[1]
    assert not all(torch.equal(tensors[name], last[name]) for name in tensors)


def test_what_it_keeps_is_what_that_step_was(go: Callable[..., list[Event]], tmp_path: Path):
    """The kept adapter has the numbers of the checkpoint of its step."""
    told: list[Event] = []
    go(events=told, should_stop=lambda: len(of(told, Step)) == 2)
    cut = checkpoint.steps(tmp_path / "run")
    identity = checkpoint.Identity(recipe="0" * 64, dataset="0" * 64, base="0" * 64)
    with pytest.raises(LiveryError, match="another recipe"):
        checkpoint.latest(tmp_path / "run", identity, torch.device("cpu"))
    go(name="whole")
    kept = read_adapter(tmp_path / "whole/adapter.safetensors")[1]
    best = read_adapter(tmp_path / "whole/best-00000002.safetensors")[1]
    assert all(torch.equal(kept[name], best[name]) for name in kept)
    assert cut


def test_it_stops_when_looks_bring_nothing_better(go: Callable[..., list[Event]]):
    run = record(go(stop={"patience": 2}))
    assert (len(run.steps), run.chosen_step) == (4, 2)
    assert run.ended.startswith("Stopped at step 4 of 6, as 2 looks brought nothing better; kept step 2")


def test_small_gains_are_none_when_a_larger_one_is_asked_for(go: Callable[..., list[Event]]):
    run = record(go(curve=[1.0, 0.9, 0.89, 0.88, 0.87, 0.86, 0.85], stop={"patience": 3, "min_gain": 0.05}))
    assert (len(run.steps), run.chosen_step) == (4, 1)


def test_without_patience_or_rule_it_runs_to_the_end_and_keeps_the_last(
    go: Callable[..., list[Event]], tmp_path: Path
):
    run = record(go(stop={"keep": "last"}))
    assert (len(run.steps), run.chosen_step) == (6, 6)
    assert run.ended == "Ran all 6 steps; kept the last."
    assert not list((tmp_path / "run").glob("best-*"))


def test_a_judge_decides_in_place_of_the_loss(go: Callable[..., list[Event]], tmp_path: Path):
    asked: list[int] = []

    def score(path: Path) -> float:
        asked.append(read_adapter(path)[0].card.step)
        return -abs(asked[-1] - 4)

    run = record(go(score=score))
    assert asked == [1, 2, 3, 4, 5, 6]
    assert run.chosen_step == 4
    assert [look.score for look in run.validations] == [None, -3, -2, -1, 0, -1, -2]
    assert "kept step 4, which has its score 0" in run.ended
    assert [path.name for path in (tmp_path / "run").glob("best-*")] == ["best-00000004.safetensors"]


def test_stopped_behind_the_best_and_gone_on_it_ends_with_the_same_bytes(
    go: Callable[..., list[Event]], tmp_path: Path
):
    """The best step's adapter outlives the stop, though its checkpoint is gone by then."""
    go(name="whole", stop={"patience": 4})
    told: list[Event] = []
    go(events=told, stop={"patience": 4}, should_stop=lambda: len(of(told, Step)) == 5)
    assert checkpoint.steps(tmp_path / "run") == [4, 5]
    shutil.rmtree(tmp_path / "cache")
    go(first=6, stop={"patience": 4})
    whole, cut = (tmp_path / name / "adapter.safetensors" for name in ("whole", "run"))
    assert whole.read_bytes() == cut.read_bytes()
    assert read_adapter(cut)[0].card.step == 2


def test_a_lost_best_adapter_sends_the_run_back_to_a_checkpoint_that_has_it(
    go: Callable[..., list[Event]], tmp_path: Path
):
    told: list[Event] = []
    go(events=told, should_stop=lambda: len(of(told, Step)) == 2)
    (tmp_path / "run/best-00000002.safetensors").unlink()
    found = go(first=2)
    assert of(found, Step)[0].step == 2
    assert record(found).chosen_step == 2


# ----------------------------------------------------------------------------- what goes wrong


def test_an_explosion_ends_the_run_at_its_last_good_checkpoint(
    go: Callable[..., list[Event]], base: SD1, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    predict, calls = base.predict, [0]

    def exploding(*parts: Any) -> torch.Tensor:
        calls[0] += 1
        return predict(*parts) * (1e3 if calls[0] > 20 else 1)

    monkeypatch.setattr(base, "predict", exploding)
    with pytest.raises(LiveryError, match=r"exploded after step 20: .*back at its checkpoint of step 20\."):
        go(steps=40, validate_every=0)
    assert checkpoint.steps(tmp_path / "run")[-1] == 20


def test_blank_samples_end_the_run(go: Callable[..., list[Event]], tmp_path: Path):
    drawn = [0]

    def draw(prompts: Sequence[str], seeds: Sequence[int]) -> Iterator[Image.Image]:
        drawn[0] += 1
        picture = Image.linear_gradient("L") if drawn[0] < 3 else Image.new("RGB", (8, 8))
        return (picture.convert("RGB") for _ in prompts)

    with pytest.raises(LiveryError, match=r"all 2 samples of step 2 are blank: .*checkpoint of step 1\."):
        go(sample_every=1, sample_prompts=["a", "b"], draw=draw)
    assert checkpoint.steps(tmp_path / "run") == [1]


def test_weights_that_are_no_numbers_are_never_saved(
    go: Callable[..., list[Event]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    state = session.Learner.state

    def broken(learner: session.Learner) -> dict[str, torch.Tensor]:
        found = state(learner)
        if int(found["optimizer/" + next(n for n in _names(found) if n.endswith("/step"))]) == 2:
            first = next(name for name in found if name.startswith("tuner/"))
            found[first] = found[first] * math.nan
        return found

    monkeypatch.setattr(session.Learner, "state", broken)
    with pytest.raises(LiveryError, match=r"holds numbers that are not finite at step 2: .*of step 1\."):
        go()
    assert checkpoint.steps(tmp_path / "run") == [1]


def _names(state: dict[str, torch.Tensor]) -> list[str]:
    return [name.removeprefix("optimizer/") for name in state if name.startswith("optimizer/")]


def test_slow_steps_are_told_while_the_run_goes_on(go: Callable[..., list[Event]]):
    now, told = [0.0], []

    def clock() -> float:
        now[0] += 10.0 if len(of(told, Step)) > 15 else 1.0
        return now[0]

    go(events=told, clock=clock, steps=25, validate_every=0, checkpoint_every=25, stop={"check_effect_at": 0})
    warnings = [note.text for note in of(told, Note) if "Steps suddenly take 10 times" in note.text]
    assert len(warnings) == 1
    assert of(told, Validation) == []
    assert len(of(told, Step)) == 25
