"""A whole evaluation with a judge and an engine whose answers are known: every score is worked out by hand.

It proves the bookkeeping: which pictures are drawn, judged, paired and reported. Of real models it says
nothing.
"""

from collections.abc import Iterable
from pathlib import Path

import pytest

from livery.evaluate.run import Subject, Tools, evaluate, quick, with_trigger
from livery.evaluate.verdict import Table
from livery.nouns import Evaluated, Event, LiveryError, Progress, Question, Report, Suite
from tests.evaluate.fakes import CONCEPTS, STYLES, Blobs, FakeEmbedder, FakeEngine, flat

WANTED = 2
TEMPLATES = ("{prompt}", "{prompt}, like one", "{prompt}, like two", "like two: {prompt}")


@pytest.fixture
def blobs() -> Blobs:
    return Blobs()


def suite_of(blobs: Blobs, **changes: object) -> Suite:
    """Four reported concepts (0 to 3), two to tune on (4, 5), two references (6, 7)."""
    suite = Suite(
        name="known",
        questions=tuple(
            Question(prompt=f"thing {n}", concept=f"thing {n}", reference=blobs.put_image(flat(n, WANTED)))
            for n in range(4)
        ),
        tuning=tuple(Question(prompt=f"thing {n}", concept=f"thing {n}") for n in (4, 5)),
        seeds=(0, 1),
        style=f"look {WANTED}",
        styles=tuple(f"look {n}" for n in range(STYLES)),
        concepts=tuple(f"thing {n}" for n in range(CONCEPTS)),
        style_prompts=TEMPLATES,
        references=tuple(blobs.put_image(flat(n, WANTED)) for n in (6, 7)),
    )
    return suite.model_copy(update=changes)


def subject_of(blobs: Blobs, **changes: object) -> Subject:
    photos = tuple(blobs.put_image(flat(n, WANTED)) for n in (8, 9))
    values = {"adapter": "a" * 64, "trigger": "look two", "train_photos": photos, **changes}
    return Subject(title="Known", base_sha256="b" * 64, **values)


def tools_of(blobs: Blobs, engine: FakeEngine, memory: Path | None = None) -> Tools:
    return Tools(FakeEmbedder(), engine, blobs.read, blobs.put, memory)


def report_of(events: Iterable[Event]) -> Report:
    last = list(events)[-1]
    assert isinstance(last, Evaluated)
    return last.report


@pytest.fixture
def report(blobs: Blobs) -> Report:
    return report_of(evaluate(suite_of(blobs), subject_of(blobs), tools_of(blobs, FakeEngine())))


def value(report: Report, metric: str, arm: str) -> float:
    found = Table(report.scores, report.differences).score(metric, arm)
    assert found is not None, (metric, arm)
    return found.value


def test_every_score_is_the_known_one(report: Report):
    assert value(report, "style", "base") == 0
    assert value(report, "style", "prompted") == 0.5  # even seeds only
    assert value(report, "style", "tuned") == 1
    assert value(report, "style", "designers") == 1
    # The tuned model draws thing 0 for thing 1, and six labels fit that picture better than the asked one.
    assert value(report, "concept", "base") == 1
    assert value(report, "concept", "tuned") == 0.75
    assert value(report, "concept", "designers") == 1
    # Seed 0 has no mark: base shares the concept only (1/2); prompted is the original. Seed 1 is a hair away.
    assert value(report, "likeness", "base") == pytest.approx(0.5, abs=1e-3)
    assert value(report, "likeness", "prompted") == pytest.approx(0.75, abs=1e-3)
    assert value(report, "likeness", "tuned") == pytest.approx((3 + 0.5) / 4, abs=1e-3)
    assert value(report, "likeness", "other designs") == pytest.approx(0.5)
    # The nearest training picture shares the style, never the concept.
    assert value(report, "nearest", "tuned") == pytest.approx(0.5, abs=1e-3)
    assert value(report, "nearest", "base") == pytest.approx(0, abs=1e-3)
    assert value(report, "nearest", "designers") == pytest.approx(0.5)
    assert value(report, "too_near", "tuned") == 0


def test_intervals_and_differences_are_over_prompts(report: Report):
    table = Table(report.scores, report.differences)
    style = table.difference("style", "tuned", "prompted")
    likeness = table.difference("likeness", "tuned", "prompted")
    assert style is not None
    assert likeness is not None
    assert (style.value, style.low, style.high, style.n) == (0.5, 0.5, 0.5, 4)
    assert likeness.value == pytest.approx(0.125, abs=1e-3)
    assert likeness.low < 0 < likeness.high  # four prompts, one of them lost: not sure
    assert not report.passed
    assert "does not pass" in report.verdict[0]
    assert "100% (100–100%)" in report.verdict[0]
    assert "50% (50–50%)" in report.verdict[0]


def test_pictures_cover_every_arm_question_and_seed_once(report: Report):
    keys = [(p.arm, p.prompt, p.seed) for p in report.pictures]
    assert len(keys) == len(set(keys)) == 3 * 4 * 2 + 4
    assert report.arms == ("base", "prompted", "tuned", "designers")
    first = next(p for p in report.pictures if p.arm == "tuned")
    assert first.scores["style"] == 1
    assert set(first.scores) == {"style", "nearness", "likeness", "concept", "nearest", "too_near"}


def test_all_arms_get_the_same_questions_and_seeds_and_training_places_the_trigger(blobs: Blobs):
    engine = FakeEngine()
    list(evaluate(suite_of(blobs), subject_of(blobs), tools_of(blobs, engine)))
    tuned = [(prompt, seed) for model, prompt, seed in engine.calls if model == "tuned"]
    assert tuned == [(f"thing {n}, look two", seed) for n in range(4) for seed in (0, 1)]
    reported = [(prompt, seed) for model, prompt, seed in engine.calls if model == "base"][8:]
    plain = [(f"thing {n}", seed) for n in range(4) for seed in (0, 1)]
    assert reported[:8] == plain
    assert reported[8:] == [(f"{prompt}, like two", seed) for prompt, seed in plain]
    assert with_trigger("a cat", "") == "a cat"


def test_the_style_prompt_is_chosen_on_other_questions_with_one_seed_each(blobs: Blobs):
    engine = FakeEngine()
    report = report_of(evaluate(suite_of(blobs), subject_of(blobs), tools_of(blobs, engine)))
    assert report.style_prompt == "{prompt}, like two"  # the first of the two equally good ones
    trials = engine.calls[: len(TEMPLATES) * 2]
    assert {seed for _, _, seed in trials} == {0}
    assert {prompt.split("thing ")[1][0] for _, prompt, _ in trials} == {"4", "5"}


def test_the_same_seed_gives_the_same_report(blobs: Blobs, report: Report):
    again = report_of(evaluate(suite_of(blobs), subject_of(blobs), tools_of(blobs, FakeEngine())))
    same = {"seconds": 0.0}
    assert again.model_copy(update=same).id == report.model_copy(update=same).id


@pytest.mark.parametrize("killed_after", [0, 3, 8, 15, 31])
def test_after_a_kill_no_finished_picture_is_drawn_again(blobs: Blobs, tmp_path: Path, killed_after: int):
    suite, subject = suite_of(blobs), subject_of(blobs)
    first, second = FakeEngine(die_after=killed_after), FakeEngine()
    with pytest.raises(KeyboardInterrupt):
        list(evaluate(suite, subject, tools_of(blobs, first, tmp_path)))
    resumed = report_of(evaluate(suite, subject, tools_of(blobs, second, tmp_path)))
    whole = report_of(evaluate(suite, subject, tools_of(blobs, FakeEngine())))
    assert len(first.calls) == killed_after
    assert not set(first.calls) & set(second.calls)
    assert len(first.calls) + len(second.calls) == 8 + 3 * 8
    same = {"seconds": 0.0}
    assert resumed.model_copy(update=same) == whole.model_copy(update=same)
    assert not list(tmp_path.glob(".*"))


def test_another_adapter_shares_the_base_pictures_only(blobs: Blobs, tmp_path: Path):
    engine = FakeEngine()
    for adapter in ("a" * 64, "c" * 64):
        list(evaluate(suite_of(blobs), subject_of(blobs, adapter=adapter), tools_of(blobs, engine, tmp_path)))
    assert sum(model == "tuned" for model, _, _ in engine.calls) == 16
    assert sum(model == "base" for model, _, _ in engine.calls) == 8 + 16


def test_a_forgotten_blob_is_drawn_again(blobs: Blobs, tmp_path: Path):
    report = report_of(evaluate(suite_of(blobs), subject_of(blobs), tools_of(blobs, FakeEngine(), tmp_path)))
    lost = next(p for p in report.pictures if p.arm == "tuned" and p.seed == 1)
    del blobs.kept[lost.sha256]
    engine = FakeEngine()
    list(evaluate(suite_of(blobs), subject_of(blobs), tools_of(blobs, engine, tmp_path)))
    assert {seed for _, _, seed in engine.calls} == {1}
    assert lost.sha256 in blobs.kept


def test_progress_runs_to_its_total_in_every_stage(blobs: Blobs):
    events = list(evaluate(suite_of(blobs), subject_of(blobs), tools_of(blobs, FakeEngine())))
    last: dict[str, Progress] = {e.stage: e for e in events if isinstance(e, Progress)}
    assert list(last) == ["try style prompts", "draw base", "draw prompted", "draw tuned", "judge"]
    assert all(event.done == event.total for event in last.values())


def test_the_nearest_training_pictures_are_named(report: Report, blobs: Blobs):
    assert len(report.nearest) == 8
    similarities = [match.similarity for match in report.nearest]
    assert similarities == sorted(similarities, reverse=True)
    assert {match.reference for match in report.nearest} <= set(subject_of(blobs).train_photos)


def test_a_tuned_model_that_wins_surely_passes(blobs: Blobs):
    """Without thing 1, which the fake tuned model loses, and with templates that do not help."""
    suite = suite_of(blobs, style_prompts=TEMPLATES[:2])
    suite = suite.model_copy(update={"questions": (suite.questions[0], *suite.questions[2:])})
    report = report_of(evaluate(suite, subject_of(blobs), tools_of(blobs, FakeEngine())))
    assert report.passed
    assert report.verdict[0].startswith("It works: the tuned model draws in the house style in 100%")
    assert "the best of 2 prompts on the base model in 0%" in report.verdict[0]


def test_it_says_when_prompting_would_have_done(blobs: Blobs):
    class Prompted(FakeEngine):
        def __call__(self, model, prompts, seeds):
            for thing in (p.split("thing ")[1][0] for p in prompts):
                yield flat(int(thing), WANTED)

    report = report_of(evaluate(suite_of(blobs), subject_of(blobs), tools_of(blobs, Prompted())))
    assert not report.passed
    assert report.verdict[-1].startswith("Prompting would have done")


def test_it_does_not_praise_prompting_where_neither_reached_the_style(blobs: Blobs):
    class Plain(FakeEngine):
        def __call__(self, model, prompts, seeds):
            yield from (flat(int(p.split("thing ")[1][0]), 0) for p in prompts)

    report = report_of(evaluate(suite_of(blobs), subject_of(blobs), tools_of(blobs, Plain())))
    assert not report.passed
    assert report.verdict[-1].startswith("Neither training nor prompting reached")
    assert any(line.startswith("No sign of copying") for line in report.verdict)


def test_copies_are_noticed(blobs: Blobs):
    class Copier(FakeEngine):
        def __call__(self, model, prompts, seeds):
            yield from (flat(8, WANTED) for _ in prompts)

    report = report_of(evaluate(suite_of(blobs), subject_of(blobs), tools_of(blobs, Copier())))
    assert value(report, "too_near", "tuned") == 1
    assert any(line.startswith("Look at the nearest training pictures") for line in report.verdict)


def test_a_suite_with_no_labels_or_answers_is_judged_by_nearness(blobs: Blobs):
    bare = tuple(Question(prompt=f"thing {n}") for n in range(4))
    suite = suite_of(blobs, questions=bare, style="", styles=(), concepts=(), style_prompts=())
    report = report_of(evaluate(suite, subject_of(blobs, train_photos=()), tools_of(blobs, FakeEngine())))
    assert report.arms == ("base", "tuned")
    assert {score.metric for score in report.scores} == {"nearness"}
    assert report.passed
    assert "nearer to the house style than the base model" in report.verdict[0]


def test_without_an_adapter_only_prompting_is_measured(blobs: Blobs):
    report = report_of(
        evaluate(suite_of(blobs), subject_of(blobs, adapter=None), tools_of(blobs, FakeEngine()))
    )
    assert report.arms == ("base", "prompted", "designers")
    assert not report.passed
    assert report.verdict[0].startswith("No adapter was judged")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"questions": ()}, "at least one question"),
        ({"style_prompts": ("no place",)}, "'no place' lacks {prompt}"),
        ({"tuning": ()}, "needs tuning questions"),
        ({"tuning": (Question(prompt="thing 1"),)}, "both a question and a tuning question"),
        ({"style": "look 9"}, "'look 9' is not among its styles"),
        ({"concepts": ("thing 0",)}, "'thing 1' is not among"),
    ],
)
def test_a_suite_at_odds_with_itself_is_refused(blobs: Blobs, change: dict[str, object], message: str):
    with pytest.raises(LiveryError, match=message):
        list(evaluate(suite_of(blobs, **change), subject_of(blobs), tools_of(blobs, FakeEngine())))


def test_an_engine_that_stops_early_is_an_error(blobs: Blobs):
    class Lazy(FakeEngine):
        def __call__(self, model, prompts, seeds):
            yield from list(super().__call__(model, prompts, seeds))[:-1]

    with pytest.raises(LiveryError, match="drew 7 of 8"):
        list(evaluate(suite_of(blobs), subject_of(blobs), tools_of(blobs, Lazy())))


def test_quick_asks_less_of_the_same(blobs: Blobs):
    small = quick(suite_of(blobs), questions=2, tuning=1, style_prompts=3)
    assert (len(small.questions), len(small.tuning), len(small.style_prompts)) == (2, 1, 3)
    assert small.seeds == (0,)
    assert small.concepts == suite_of(blobs).concepts
