"""The report as one page that a creative director can read: no script, nothing loaded from elsewhere."""

from __future__ import annotations

import base64
import io
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image

from livery import __version__
from livery.evaluate import charts, verdict
from livery.evaluate.wording import ARMS, METRICS, Arm, Metric, duration, learning, megabytes
from livery.nouns import (
    Dataset,
    LiveryError,
    Photo,
    Picture,
    Recipe,
    Report,
    Run,
    Suite,
)

SHOWN = 12  # prompts in the open; the rest is folded
LARGEST = 256  # pixels: the longer side of an embedded picture
CONTACT = 60  # training pictures on the contact sheet


@dataclass(frozen=True)
class GridRow:
    """One prompt: the picture of each arm, in the order of the arms; none where an arm has none."""

    prompt: str
    cells: tuple[Picture | None, ...]


@dataclass(frozen=True)
class Figure:
    """One large number at the head of the page: the tuned model's, and what it is held against."""

    value: str
    what: str
    against: str


@dataclass(frozen=True)
class Chart:
    """One metric: a bar for each arm, and one sentence."""

    metric: Metric
    bars: tuple[charts.Bar, ...]
    ticks: tuple[tuple[float, str], ...]
    from_zero: bool
    sentence: str


def render(
    report: Report,
    *,
    run: Run | None,
    recipe: Recipe | None,
    dataset: Dataset | None,
    suite: Suite,
    pictures: Callable[[str], bytes],
    reliability: Mapping[str, float],
) -> str:
    """The page as HTML text; parts that are none are left out. The caller stores it as `Report.html`.

    pictures: blob -> bytes of an image; reliability: the judge card's. Raises LiveryError for a picture
    that cannot be read.
    """

    @cache
    def embed(sha256: str) -> str:
        return data_uri(pictures(sha256), sha256)

    table = verdict.Table(report.scores, report.differences)
    seeds = sorted({p.seed for p in report.pictures if p.arm != "designers"})
    grids = [(seed, grid(report, seed)) for seed in seeds]
    return (
        _environment()
        .get_template("report.html")
        .render(
            report=report,
            run=run,
            recipe=_settings(recipe or (run.recipe if run else None)),
            dataset=dataset,
            suite=suite,
            reliability=reliability,
            embed=embed,
            figures=list(figures(table)),
            arms=[_arm(arm) for arm in report.arms],
            grids=grids,
            seeds=seeds,
            shown=SHOWN,
            charts=list(score_charts(report, table)),
            curves=charts.curves(run) if run else None,
            learning=learning(run) if run else "",
            yardstick=table.score("nearest", "designers"),
            contact=dataset.split("train")[:CONTACT] if dataset else (),
            licences=_credits(dataset.photos) if dataset else [],
            prompts_count=len(suite.questions),
            duration=duration,
            megabytes=megabytes,
            percent=verdict.percent,
            version=__version__,
        )
    )


def grid(report: Report, seed: int) -> list[GridRow]:
    """One row per question, in the report's order, with the pictures of one seed.

    Two questions may have one prompt: its n-th picture in one arm stands beside its n-th in the others.
    """
    place: dict[tuple[str, str, int], Picture] = {}
    seen: Counter[tuple[str, str]] = Counter()
    for picture in report.pictures:
        if picture.seed == seed or picture.arm == "designers":
            place[picture.arm, picture.prompt, seen[picture.arm, picture.prompt]] = picture
            seen[picture.arm, picture.prompt] += 1
    drawn = dict.fromkeys((prompt, n) for arm, prompt, n in place if arm != "designers")
    return [GridRow(prompt, tuple(place.get((arm, prompt, n)) for arm in report.arms)) for prompt, n in drawn]


def score_charts(report: Report, table: verdict.Table) -> Iterator[Chart]:
    """A chart for each metric that was measured, in the order of METRICS."""
    for metric in METRICS:
        found = [(arm, table.score(metric.key, arm)) for arm in (*report.arms, "other designs")]
        there = [(arm, interval) for arm, interval in found if interval is not None]
        if not there:
            continue
        shares = metric.key in verdict.SHARES
        ends = [value for _, i in there for value in (i.low, i.high)]
        axis = charts.SHARE_AXIS if shares else charts.Axis.around(ends)
        write = verdict.share if shares else verdict.cosine
        bars = tuple(charts.bar(axis, arm, _arm(arm).title, i, write(i)) for arm, i in there)
        texts = [f"{tick:.0%}" if shares else verdict.minus(f"{tick:g}") for tick in axis.ticks]
        ticks = tuple((axis.place(tick), text) for tick, text in zip(axis.ticks, texts, strict=True))
        yield Chart(metric, bars, ticks, shares, gain_sentence(metric, table))


def figures(table: verdict.Table) -> Iterator[Figure]:
    """The numbers that carry the verdict: style and likeness against the rival, concept against the base."""
    said = {
        "style": "are in the house style",
        "likeness": "likeness to the designers",
        "concept": "show what was asked",
    }
    for key, what in said.items():
        other = "base" if key == "concept" else table.rival()
        tuned, rival = table.score(key, "tuned"), table.score(key, other)
        if tuned and rival:
            write = verdict.share if key in verdict.SHARES else verdict.cosine
            value, against = (write(i).split(" ")[0] for i in (tuned, rival))
            yield Figure(value, what, f"{ARMS[other].short}: {against}")


def gain_sentence(metric: Metric, table: verdict.Table) -> str:
    """What the tuned model gained or lost on this metric, and whether that is sure."""
    if metric.key == "nearest":  # here the yardstick is the brand, not the base model
        beyond = table.score("too_near", "tuned")
        said = (
            "of the tuned pictures lie nearer to a training picture than 99% of the designers' new ones do."
        )
        return f"{verdict.share(beyond)} {said}" if beyond else ""
    other = "base" if metric.key == "concept" else table.rival()
    gain = table.difference(metric.key, "tuned", other)
    if gain is None:
        return ""
    sure = "a clear gain" if gain.low > 0 else "a clear loss" if gain.high < 0 else "within chance"
    by = verdict.points(gain) if metric.key in verdict.SHARES else verdict.change(gain)
    return f"Tuned against {ARMS[other].sentence}: {by}, {sure}."


def data_uri(data: bytes, sha256: str) -> str:
    """An image as a WebP data URI, at most LARGEST pixels a side. Raises LiveryError."""
    try:
        with Image.open(io.BytesIO(data)) as opened:
            image = opened.convert("RGBA" if opened.has_transparency_data else "RGB")
    except (OSError, ValueError) as error:
        raise LiveryError(f"picture {sha256}: cannot be read: {error}; evaluate again.") from None
    image.thumbnail((LARGEST, LARGEST), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=90, method=4)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def _arm(key: str) -> Arm:
    return ARMS.get(key, Arm(key, key, ""))


def _settings(recipe: Recipe | None) -> list[tuple[str, str]]:
    """The recipe as words and values: its tuners, what everybody asks for, what is not default."""
    if recipe is None:
        return []
    changed = recipe.model_dump(mode="json", exclude_defaults=True, exclude={"tuners", "version"})
    always = {key: getattr(recipe, key) for key in ("base", "steps", "batch_size", "learning_rate", "seed")}
    rows = [("tuners", "; ".join(spec.summary for spec in recipe.tuners))]
    for key, value in {**always, **changed}.items():
        parts = value.items() if isinstance(value, dict) else [("", value)]
        rows += [(f"{key} {part}".strip().replace("_", " "), _words(each)) for part, each in parts]
    return rows


def _words(value: object) -> str:
    return "; ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _credits(photos: Sequence[Photo]) -> list[tuple[str, str, int]]:
    """(licence, attribution, number of pictures), the most frequent first."""
    counts: dict[tuple[str, str], int] = {}
    for photo in photos:
        key = (photo.licence or "no licence given", photo.attribution)
        counts[key] = counts.get(key, 0) + 1
    return sorted(((a, b, n) for (a, b), n in counts.items()), key=lambda row: -row[2])


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("livery.evaluate"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["unbroken"] = _unbroken
    return environment


def _unbroken(text: str) -> str:
    """No line break within `88–97%`: word joiners round the dash. Still escaped afterwards."""
    return text.replace("–", "\u2060–\u2060")
