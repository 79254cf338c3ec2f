"""The page: whole, self-contained and safe against hostile strings. How it looks is for eyes to judge."""

import base64
import io
import re
from html.parser import HTMLParser

import pytest
from PIL import Image

from livery.evaluate.report import LARGEST, SHOWN, data_uri, grid, render
from livery.evaluate.run import Tools, evaluate
from livery.nouns import Dataset, LiveryError, Photo, Question, Recipe, Report, Run, Step, Suite, Validation
from tests.evaluate.fakes import Blobs, FakeEmbedder, FakeEngine, flat
from tests.evaluate.test_run import report_of, subject_of, suite_of

HOSTILE = """</style><script>alert(1)</script>"'&{{ 7*7 }}<img src=http://evil.example/x onerror=x>"""
SECTIONS = ["pictures", "scores", "learning", "copying", "dataset", "making", "method"]


class Page(HTMLParser):
    """Tags with their attributes, section ids, and the text that a reader sees."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {key: value or "" for key, value in attrs}))

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture
def blobs() -> Blobs:
    return Blobs()


def run_of(**changes: object) -> Run:
    steps = tuple(Step(step=n, loss=1 / n, learning_rate=1e-3) for n in range(1, 41))
    checks = tuple(Validation(step=n, loss=0.5 - n / 100) for n in (0, 20, 40))
    run = Run(
        recipe=Recipe(trigger="look two"),
        dataset="d" * 64,
        base_sha256="b" * 64,
        adapter="a" * 64,
        steps=steps,
        validations=checks,
        seconds=200,
        peak_memory_bytes=1_500_000_000,
        device="one processor",
    )
    return run.model_copy(update=changes)


def dataset_of(blobs: Blobs, **changes: object) -> Dataset:
    photos = tuple(
        Photo(
            sha256=blobs.put_image(flat(n, 2)),
            width=8,
            height=8,
            captions=(f"thing {n}",),
            licence="CC-BY-SA-4.0",
            attribution="The Designers",
        )
        for n in (8, 9)
    )
    return Dataset(name="Known brand", photos=photos, notes=("one note",)).model_copy(update=changes)


def report_for(suite: Suite, blobs: Blobs, title: str = "Known") -> Report:
    tools = Tools(FakeEmbedder(), FakeEngine(), blobs.read, blobs.put)
    report = report_of(evaluate(suite, subject_of(blobs), tools))
    return report.model_copy(update={"title": title})


def page_of(report: Report, suite: Suite, blobs: Blobs, dataset: Dataset | None, run: Run | None) -> str:
    return render(
        report,
        run=run,
        recipe=None,
        dataset=dataset,
        suite=suite,
        pictures=blobs.kept.__getitem__,
        reliability={"style": 0.97, "concept_top5": 0.84},
    )


@pytest.fixture
def html(blobs: Blobs) -> str:
    suite = suite_of(blobs)
    return page_of(report_for(suite, blobs), suite, blobs, dataset_of(blobs), run_of())


def test_every_section_is_there_and_the_pictures_come_first(html: str):
    assert [attributes["id"] for attributes in Page(html).all("section")] == SECTIONS


def test_it_says_what_a_reader_needs(html: str):
    text = Page(html).text
    for said in (
        "Known",
        "Did not pass",
        "It does not pass: the tuned model draws in the house style",
        "CC-BY-SA-4.0",
        "The Designers",
        "one note",
        "3 min 20 s",
        "1.5 GB",
        "one processor",
        "lora, rank 16",
        "fake judge",
        "right style in 97%",
        "first five guesses in 84%",
        "{prompt}, like two",
        "fell from 0.500 to 0.100",
    ):
        assert said in text, said


def test_every_picture_is_inside_and_nothing_is_loaded_from_elsewhere(html: str):
    page = Page(html)
    images = page.all("img")
    assert len(images) == 4 * 4 * 2 + 8 * 2 + 2  # grid: prompts x arms x seeds; pairs; contact sheet
    assert all(image["src"].startswith("data:image/webp;base64,") for image in images)
    assert all(image["alt"] for image in images)
    assert not page.all("script")
    assert not page.all("link")
    assert not re.search(r"""(?:src|href|action)\s*=\s*["']?(?:https?:)?//""", html)
    assert not re.search(r"url\(|@import", html)


def test_embedded_pictures_are_the_stored_ones(html: str, blobs: Blobs):
    drawn = {tuple(flat(n, 2).getpixel((0, 0))) for n in (8, 9)}  # type: ignore[arg-type]
    seen = set()
    for image in Page(html).all("img")[-2:]:
        data = base64.b64decode(image["src"].split(",", 1)[1])
        seen.add(Image.open(io.BytesIO(data)).convert("RGB").getpixel((0, 0)))
    assert len(seen) <= len(drawn)
    assert all(abs(a - b) <= 12 for s in seen for a, b in zip(s, (8, 2, 0), strict=True))  # lossy


def test_hostile_strings_stay_text(blobs: Blobs):
    suite = suite_of(blobs, name=HOSTILE, style_prompts=("{prompt} " + HOSTILE,))
    report = report_for(suite, blobs, HOSTILE)
    pictures = tuple(p.model_copy(update={"prompt": HOSTILE + p.prompt}) for p in report.pictures)
    changes = {"pictures": pictures, "embedder": HOSTILE, "drawing": HOSTILE, "verdict": (HOSTILE, HOSTILE)}
    photos = tuple(
        p.model_copy(update={"captions": (HOSTILE,), "licence": HOSTILE, "attribution": HOSTILE})
        for p in dataset_of(blobs).photos
    )
    dataset = dataset_of(blobs, photos=photos, name=HOSTILE, notes=(HOSTILE,), background=HOSTILE)
    run = run_of(device=HOSTILE, recipe=Recipe(trigger=HOSTILE, sample_prompts=(HOSTILE,)))
    html = page_of(report.model_copy(update=changes), suite, blobs, dataset, run)
    page = Page(html)
    assert not page.all("script")
    assert all(image["src"].startswith("data:") and "onerror" not in image for image in page.all("img"))
    assert len(page.all("style")) == 1
    assert "49" not in re.findall(r"&lt;/script&gt;(.{0,20})", html)
    assert HOSTILE in page.text


def test_a_page_without_run_or_dataset_leaves_their_parts_out(blobs: Blobs):
    suite = suite_of(blobs)
    page = Page(page_of(report_for(suite, blobs), suite, blobs, None, None))
    assert [a["id"] for a in page.all("section")] == ["pictures", "scores", "copying", "making", "method"]


def test_prompts_past_the_first_few_are_folded(blobs: Blobs):
    many = tuple(Question(prompt=f"thing {n % 4}, take {n}") for n in range(SHOWN + 3))
    suite = suite_of(blobs, questions=many, tuning=(), style_prompts=(), seeds=(0,))
    page = Page(page_of(report_for(suite, blobs), suite, blobs, None, None))
    assert len(page.all("details")) == 1
    assert "3 more prompts" in page.text


def test_the_grid_pairs_each_prompt_with_every_arm(blobs: Blobs):
    suite = suite_of(blobs)
    report = report_for(suite, blobs)
    rows = grid(report, seed=1)
    assert [row.prompt for row in rows] == [q.prompt for q in suite.questions]
    for row in rows:
        assert [cell.arm for cell in row.cells if cell] == list(report.arms)
        assert [cell.seed for cell in row.cells if cell] == [1, 1, 1, 0]  # the designers drew once


def test_questions_with_one_prompt_keep_a_row_each(blobs: Blobs):
    twice = suite_of(blobs).questions
    suite = suite_of(blobs, questions=(twice[0], twice[1], twice[0].model_copy(update={"concept": ""})))
    rows = grid(report_for(suite, blobs), seed=0)
    assert [row.prompt for row in rows] == ["thing 0", "thing 1", "thing 0"]
    assert all(None not in row.cells for row in rows)


def test_the_same_report_gives_the_same_page(blobs: Blobs):
    suite = suite_of(blobs)
    report = report_for(suite, blobs)
    first, second = (page_of(report, suite, blobs, dataset_of(blobs), run_of()) for _ in range(2))
    assert first == second


def test_large_pictures_are_made_small_and_broken_ones_named(blobs: Blobs):
    big = blobs.put_image(Image.new("RGB", (1000, 400), "red"))
    data = base64.b64decode(data_uri(blobs.kept[big], big).split(",", 1)[1])
    assert max(Image.open(io.BytesIO(data)).size) == LARGEST
    with pytest.raises(LiveryError, match="picture abc: cannot be read"):
        data_uri(b"not a picture", "abc")
