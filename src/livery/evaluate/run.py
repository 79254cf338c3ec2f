"""One adapter on one suite, always against its base model on the same prompts and seeds.

Four arms: `base` (the plain prompt), `prompted` (the base with the best style prompt), `tuned`
(the adapter), `designers` (the reference pictures themselves, where the suite has them).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from livery.evaluate import fidelity
from livery.evaluate.copying import Nearest
from livery.evaluate.drawing import Desk, Generate, Memory, Model
from livery.evaluate.embedder import Embedder
from livery.evaluate.intervals import difference, interval
from livery.evaluate.measure import Row, Values, Yardsticks, look, yardsticks
from livery.evaluate.prompt import label_numbers
from livery.evaluate.verdict import Table, verdict
from livery.nouns import (
    Difference,
    Evaluated,
    Event,
    Interval,
    LiveryError,
    Match,
    Picture,
    Progress,
    Report,
    Score,
    Suite,
    with_trigger,
)

PAIRS = (("tuned", "prompted"), ("tuned", "base"), ("prompted", "base"))
MATCHES = 8  # the most similar training pictures that a report shows


@dataclass(frozen=True)
class Subject:
    """What is judged. Ids are those of the nouns; without an adapter there is no `tuned` arm."""

    title: str
    base_sha256: str
    adapter: str | None = None
    dataset: str | None = None
    run: str | None = None
    trigger: str = ""
    train_photos: tuple[str, ...] = ()  # blobs


@dataclass(frozen=True)
class Tools:
    """What an evaluation works with; the engine and the store come in as functions.

    drawing: how `generate` draws (sampler, steps, guidance), in words; a change of it draws all anew.
    memory: folder that remembers finished pictures, so that a killed evaluation goes on; none = forget.
    """

    embedder: Embedder
    generate: Generate
    read_picture: Callable[[str], Image.Image]
    put_blob: Callable[[bytes], str]
    memory: Path | None = None
    drawing: str = ""


def quick(suite: Suite, questions: int = 12, tuning: int = 4, style_prompts: int = 4) -> Suite:
    """A smaller suite of the same kind, one seed: for a first look. Its intervals are wide, and say so."""
    return suite.model_copy(
        update={
            "name": f"{suite.name}, quick",
            "questions": suite.questions[:questions],
            "tuning": suite.tuning[:tuning],
            "style_prompts": suite.style_prompts[:style_prompts],
            "seeds": suite.seeds[:1],
        }
    )


def evaluate(suite: Suite, subject: Subject, tools: Tools) -> Iterator[Event]:
    """Yields Progress, and last Evaluated with the report; its page is not written yet (`html` is none).

    The same suite, subject and tools give the same report but for `seconds`. Raises LiveryError when the
    suite is at odds with itself or a picture cannot be read.
    """
    started = time.monotonic()
    check(suite)
    sticks = yardsticks(suite, tools.embedder, tools.read_picture, subject.train_photos)
    desk = _desk(subject, tools)
    style_prompt = yield from choose_style_prompt(suite, desk, sticks, tools.embedder)
    arms = yield from _draw_arms(suite, subject, desk, style_prompt)
    seen: dict[str, Tensor] = {}
    for number, (arm, rows) in enumerate(arms.items()):
        yield Progress(stage="judge", done=number, total=len(arms))
        seen[arm] = look(tools.embedder, tools.read_picture, [row.sha256 for row in rows])
    yield Progress(stage="judge", done=len(arms), total=len(arms))
    values = {arm: _values(arm, rows, seen[arm], sticks) for arm, rows in arms.items()}
    table = Table(tuple(_scores(arms, values, sticks)), tuple(_differences(arms, values)))
    yield Evaluated(
        report=Report(
            title=subject.title,
            adapter=subject.adapter,
            base_sha256=subject.base_sha256,
            dataset=subject.dataset,
            run=subject.run,
            suite=suite.id,
            embedder=tools.embedder.name,
            embedder_sha256=tools.embedder.sha256,
            style_prompt=style_prompt,
            arms=tuple(arms),
            scores=tuple(table.scores),
            differences=tuple(table.differences),
            pictures=tuple(_pictures(suite, arms, values)),
            nearest=_matches(sticks, arms, seen),
            drawing=tools.drawing,
            verdict=verdict(table, suite),
            passed=table.passed(),
            seconds=round(time.monotonic() - started, 1),
        )
    )


def check(suite: Suite) -> None:
    """Refuse, before anything is drawn, a suite that cannot be answered. Raises LiveryError."""
    if not suite.questions or not suite.seeds:
        raise LiveryError(f"suite {suite.name}: it needs at least one question and one seed.")
    for template in suite.style_prompts:
        if "{prompt}" not in template:
            raise LiveryError(f"suite {suite.name}: style prompt '{template}' lacks {{prompt}}; put it in.")
    if suite.concepts:
        label_numbers([q.concept for q in suite.questions if q.concept], suite.concepts)
    if len(suite.style_prompts) > 1 and not suite.tuning:
        raise LiveryError(
            f"suite {suite.name}: choosing among style prompts needs tuning questions; add some."
        )
    reported, tuned_on = ({q.prompt for q in qs} for qs in (suite.questions, suite.tuning))
    if both := sorted(reported & tuned_on):
        raise LiveryError(
            f"suite {suite.name}: '{both[0]}' is both a question and a tuning question; drop one."
        )


def choose_style_prompt(
    suite: Suite, desk: Desk, sticks: Yardsticks, embedder: Embedder
) -> Generator[Event, None, str]:
    """The template that does best on the tuning questions, one seed each; the first of equals.

    Best = share recognised as the wanted style + mean cosine with the centre of the reference pictures
    (each left out where the suite cannot ask it). Never looks at the reported questions.
    """
    if len(suite.style_prompts) < 2:
        return suite.style_prompts[0] if suite.style_prompts else "{prompt}"
    prompts = [_fill(t, q.prompt) for t in suite.style_prompts for q in suite.tuning]
    blobs = yield from desk.draw("try style prompts", "base", prompts, [suite.seeds[0]] * len(prompts))
    values = sticks.style_values(look(embedder, desk.read_picture, blobs))
    if not values:
        raise LiveryError(
            f"suite {suite.name}: style prompts need styles or references to choose by; add them."
        )
    each = len(suite.tuning)
    marks = torch.tensor([list(rows.values()) for rows in values.values()]).sum(0)  # [templates * each]
    best = marks.reshape(-1, each).mean(1).tolist()
    return suite.style_prompts[best.index(max(best))]


def _desk(subject: Subject, tools: Tools) -> Desk:
    base = f"{subject.base_sha256} {tools.drawing}"
    models: dict[Model, str] = {"base": base, "tuned": f"{base} {subject.adapter}"}
    return Desk(tools.generate, tools.read_picture, tools.put_blob, Memory(tools.memory), models)


def _draw_arms(
    suite: Suite, subject: Subject, desk: Desk, style_prompt: str
) -> Generator[Event, None, dict[str, list[Row]]]:
    """All arms on the same questions and seeds; the designers' arm is their own pictures, one each."""
    asked = [(number, seed) for number in range(len(suite.questions)) for seed in suite.seeds]
    plain = [suite.questions[number].prompt for number, _ in asked]
    wanted: list[tuple[str, Model, list[str]]] = [("base", "base", plain)]
    if suite.style_prompts:
        wanted.append(("prompted", "base", [_fill(style_prompt, prompt) for prompt in plain]))
    if subject.adapter is not None:
        wanted.append(("tuned", "tuned", [with_trigger(prompt, subject.trigger) for prompt in plain]))
    arms: dict[str, list[Row]] = {}
    for arm, model, prompts in wanted:
        blobs = yield from desk.draw(f"draw {arm}", model, prompts, [seed for _, seed in asked])
        arms[arm] = [Row(number, seed, blob) for (number, seed), blob in zip(asked, blobs, strict=True)]
    own = [Row(n, 0, q.reference) for n, q in enumerate(suite.questions) if q.reference]
    return {**arms, "designers": own} if own else arms


def _fill(template: str, prompt: str) -> str:
    return template.replace("{prompt}", prompt)  # not str.format: prompts may hold braces


def _values(arm: str, rows: list[Row], vectors: Tensor, sticks: Yardsticks) -> Values:
    values = sticks.values(rows, vectors)
    if arm == "designers":  # a picture's likeness to itself says nothing
        values.pop("likeness", None)
    return values


def _scores(arms: dict[str, list[Row]], values: dict[str, Values], sticks: Yardsticks) -> Iterator[Score]:
    for arm, rows in arms.items():
        for metric, found in values[arm].items():
            yield Score(metric=metric, arm=arm, interval=_interval(found, rows))
    if len(sticks.originals) > 1:
        others = fidelity.likeness_of_others(torch.stack(list(sticks.originals.values())))
        spread = interval(others.tolist(), list(sticks.originals))
        yield Score(metric="likeness", arm="other designs", interval=spread)


def _differences(arms: dict[str, list[Row]], values: dict[str, Values]) -> Iterator[Difference]:
    for arm, other in PAIRS:
        if arm not in arms or other not in arms:
            continue
        for metric, found in values[arm].items():
            rows, rivals = list(found), values[other][metric]
            prompts = [arms[arm][row].question for row in rows]
            paired = difference([found[row] for row in rows], [rivals[row] for row in rows], prompts)
            yield Difference(metric=metric, arm=arm, other=other, interval=paired)


def _interval(found: dict[int, float], rows: Sequence[Row]) -> Interval:
    return interval(list(found.values()), [rows[row].question for row in found])


def _pictures(suite: Suite, arms: dict[str, list[Row]], values: dict[str, Values]) -> Iterator[Picture]:
    for arm, rows in arms.items():
        for number, row in enumerate(rows):
            question = suite.questions[row.question]
            scores = {metric: found[number] for metric, found in values[arm].items() if number in found}
            yield Picture(
                arm=arm,
                prompt=question.prompt,
                concept=question.concept,
                seed=row.seed,
                sha256=row.sha256,
                scores=scores,
            )


def _matches(sticks: Yardsticks, arms: dict[str, list[Row]], seen: dict[str, Tensor]) -> tuple[Match, ...]:
    """The tuned pictures that lie nearest to a training picture, the nearest first."""
    if sticks.shelf is None or "tuned" not in arms:
        return ()
    near: Nearest = sticks.shelf.nearest(seen["tuned"])
    order = near.similarity.argsort(descending=True, stable=True)[:MATCHES].tolist()
    return tuple(
        Match(
            sha256=arms["tuned"][row].sha256,
            reference=near.sha256s[row],
            similarity=round(near.similarity[row].item(), 6),
            mirrored=bool(near.mirrored[row]),
        )
        for row in order
    )
