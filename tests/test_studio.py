"""Every use case through Studio, on a tiny base and a tiny judge of the real classes.

Their weights are random: these tests prove that the parts fit together, not that pictures are good.
"""

import json
import shutil
import sqlite3
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from livery.models.sd1 import SD1
from livery.models.single_file import save_single_file
from livery.nouns import (
    Adapter,
    Dataset,
    Drawn,
    Evaluated,
    Event,
    Ingested,
    LiveryError,
    LowRankSpec,
    Note,
    PluginSpec,
    Recipe,
    Report,
    Run,
    Trained,
    Written,
    sha256_of,
)
from livery.store import Store
from livery.studio import Studio, read_recipe, slug
from tests.evaluate.tiny_clip import write_tiny_clip


def last(events: Iterable[Event]) -> Event:
    return list(events)[-1]


def draw_pictures(folder: Path, count: int) -> Path:
    rng = np.random.default_rng(0)
    for number in range(count):
        split = "validation" if number % 3 == 0 else "train"
        (folder / split).mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 255, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / split / f"{number}.png")
        (folder / split / f"{number}.txt").write_text(f"thing {number}")
    return folder


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace in which one adapter was trained, with a tiny base and a tiny judge beside it."""
    home = tmp_path_factory.mktemp("home")
    SD1.tiny().save(home / "base")
    write_tiny_clip(home / "judge")
    studio = Studio(Store(home / "work"))
    ingested = last(studio.ingest(draw_pictures(home / "photos", 9), name="things", licence="CC0-1.0"))
    assert isinstance(ingested, Ingested)
    trained = last(studio.train(recipe(home), ingested.dataset.id))
    assert isinstance(trained, Trained)
    studio.store.alias("things", trained.adapter.id)
    return home


def recipe(home: Path) -> Recipe:
    return Recipe(
        base=str(home / "base"),
        tuners=(LowRankSpec(rank=2),),
        trigger="our style",
        steps=3,
        batch_size=2,
        validate_every=2,
        checkpoint_every=2,
        precision="fp32",
    )


@pytest.fixture
def studio(home: Path) -> Studio:
    return Studio(Store(home / "work"))


def test_ingest_stores_the_dataset(studio: Studio) -> None:
    (dataset,) = studio.list("Dataset")
    assert isinstance(dataset, Dataset)
    assert studio.show(dataset.id[:8]) == dataset
    assert (len(dataset.split("train")), len(dataset.split("validation"))) == (6, 3)
    assert {photo.licence for photo in dataset.photos} == {"CC0-1.0"}


def test_training_again_goes_on_and_ends_in_the_same_adapter(studio: Studio, home: Path) -> None:
    (dataset,) = studio.list("Dataset")
    trained = last(studio.train(recipe(home), dataset.id))
    assert isinstance(trained, Trained)
    assert trained.adapter.id == studio.show("things").id
    assert isinstance(studio.show(trained.run.id), Run)
    assert len(trained.run.steps) == 3


def test_generate_draws_what_was_asked_with_the_trigger(studio: Studio, tmp_path: Path) -> None:
    def draw(adapter: str | None, trigger: bool = True, folder: str = "tuned") -> list[Drawn]:
        events = studio.generate(
            ["a cat"], adapter=adapter, base=str(Path(studio.store.root).parent / "base"),
            count=2, seed=5, steps=2, trigger=trigger, folder=tmp_path / folder,
        )  # fmt: skip
        return [event for event in events if isinstance(event, Drawn)]

    tuned, plain = draw("things"), draw(None, folder="plain")
    assert [(drawn.prompt, drawn.seed) for drawn in tuned] == [("a cat, our style", n) for n in (5, 6)]
    assert [drawn.prompt for drawn in plain] == ["a cat", "a cat"]
    assert draw("things") == tuned  # same request, same pictures
    untriggered = draw("things", trigger=False, folder="untriggered")
    assert [drawn.prompt for drawn in untriggered] == ["a cat", "a cat"]
    assert {drawn.sha256 for drawn in untriggered}.isdisjoint(drawn.sha256 for drawn in [*tuned, *plain])
    files = sorted((tmp_path / "tuned").iterdir())
    assert [file.name for file in files] == ["0000-a-cat-our-style-5.png", "0001-a-cat-our-style-6.png"]
    with Image.open(files[0]) as picture:
        assert isinstance(picture, Image.Image)
        assert picture.info["prompt"] == "a cat, our style"
        assert picture.info["adapter"] == studio.show("things").id


def test_evaluate_asks_the_held_out_photos_and_writes_the_page(studio: Studio, tmp_path: Path) -> None:
    evaluated = last(
        studio.evaluate("things", judge=str(Path(studio.store.root).parent / "judge"), quick=True)
    )
    assert isinstance(evaluated, Evaluated)
    report = evaluated.report
    assert studio.store.get(Report, report.id) == report
    assert set(report.arms) == {"base", "prompted", "tuned", "designers"}
    assert {picture.prompt for picture in report.pictures} == {"thing 0", "thing 3", "thing 6"}
    written = list(studio.write_report(report.id, tmp_path))
    assert all(isinstance(event, Written) for event in written)
    assert "<html" in (tmp_path / "report.html").read_text()
    assert len(list((tmp_path / "pictures").rglob("*.png"))) == len(report.pictures)


def test_the_run_of_an_adapter_of_an_older_livery_is_found(
    studio: Studio, home: Path, tmp_path: Path
) -> None:
    """Their rows keep the ids that version 1 of the recipe gave them, which are not today's."""
    shutil.copytree(home / "work", tmp_path / "work")
    store = Store(tmp_path / "work")
    run = store.list(Run)[0]  # the test before may have made another of the same adapter
    adapter = store.get(Adapter, run.adapter).model_dump(mode="json")
    old = {"base": str(home / "base"), "warmup_steps": 7, "tuners": [{"kind": "lora", "rank": 2}]}
    adapter["card"] = {**adapter["card"], "recipe": old}
    record = {**run.model_dump(mode="json"), "recipe": old, "adapter": sha256_of(adapter)}
    with sqlite3.connect(store.root / "index.sqlite") as index:
        index.execute("DELETE FROM aliases")
        index.execute("DELETE FROM nouns WHERE kind IN ('Adapter', 'Run')")
        for kind, body in (("Adapter", adapter), ("Run", record)):
            row = (sha256_of(body), kind, "2026-01-01 00:00:00", json.dumps(body))
            index.execute("INSERT INTO nouns VALUES (?, ?, ?, ?)", row)
    evaluated = last(Studio(store).evaluate(sha256_of(adapter), judge=str(home / "judge"), quick=True))
    assert isinstance(evaluated, Evaluated)
    (found,) = store.list(Run)
    assert evaluated.report.run == found.id


def test_an_exported_adapter_is_the_file_that_diffusers_reads(studio: Studio, tmp_path: Path) -> None:
    *_, written = studio.export("things", tmp_path / "things.safetensors")
    assert isinstance(written, Written)
    adapter = studio.store.get(Adapter, "things")
    assert Path(written.path).read_bytes() == studio.store.read_blob(adapter.sha256)
    base = SD1.load(Path(studio.store.root).parent / "base")
    pipeline = base.pipeline("text-to-image")
    pipeline.load_lora_weights(written.path)
    assert any("lora" in name for name, _ in base.denoiser.named_parameters())


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("stepz = 3", "unknown key 'stepz': did you mean 'steps'?"),
        ("steps = 0", "steps: Input should be greater than 0"),
        ("steps = [", "cannot be read as a recipe"),
        ('tuners = [{kind = "lora", rnk = 3}]', "tuners.0: unknown key 'rnk': did you mean 'rank'?"),
    ],
)
def test_a_bad_recipe_is_one_sentence_that_names_file_and_key(
    tmp_path: Path, text: str, complaint: str
) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    with pytest.raises(LiveryError) as caught:
        read_recipe(path)
    assert str(path) in str(caught.value)
    assert complaint in str(caught.value)


def test_unknown_things_are_refused_by_name(studio: Studio) -> None:
    with pytest.raises(LiveryError, match="nothing-here"):
        studio.show("nothing-here")
    with pytest.raises(LiveryError, match="nowhere"):
        last(studio.generate(["a"], base="/nowhere/at/all"))


def test_slugs_are_safe_file_names() -> None:
    assert slug("../A cat, on: blue!") == "a-cat-on-blue"
    assert slug("…") == "picture"
    assert len(slug("x" * 200)) == 40


def test_the_global_random_state_is_left_alone(studio: Studio) -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    last(studio.generate(["a"], base=str(Path(studio.store.root).parent / "base"), steps=1))
    assert torch.equal(torch.rand(1), expected)


def test_a_kind_that_nobody_registered_is_refused_before_the_base_is_read(home: Path) -> None:
    studio = Studio(Store(home / "work"))
    dataset = studio.list("Dataset")[0]
    wrong = Recipe(base="nowhere", tuners=(PluginSpec(kind="lorra"),))
    with pytest.raises(LiveryError, match="no tuner is called 'lorra': did you mean 'lora'"):
        list(studio.train(wrong, dataset.id))


def test_dreambooth_with_masks_from_a_folder_of_pictures(home: Path, tmp_path: Path) -> None:
    """Transparent pictures and one class photo: the base draws the other, the mask's blob is read."""
    rng = np.random.default_rng(1)
    for name in ("mine/0", "mine/1", "_class/2"):
        pixels = rng.integers(0, 255, (40, 50, 4), dtype=np.uint8)
        pixels[:, :, 3] = 255
        pixels[:, :25, 3] = 0
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    studio = Studio(Store(tmp_path / "work"))
    ingested = last(studio.ingest(tmp_path / "mine" / "..", name="dogs", masks="alpha"))
    assert isinstance(ingested, Ingested)
    assert sorted(photo.prior for photo in ingested.dataset.photos) == [False, False, True]
    asked = recipe(home).model_dump(mode="json") | {
        "pictures": {"masks": "loss"},
        "prior": {"kind": "photos", "prompt": "a dog", "count": 2},
        "validate_every": 0,
    }
    trained = last(studio.train(Recipe.model_validate(asked), ingested.dataset.id))
    assert isinstance(trained, Trained)
    assert len(trained.run.steps) == 3
    counts = {share.what: share.count for share in studio.cache().shares}
    assert counts["masks"] == 1  # one and the same for all three
    assert counts["latents"] == 2 + 2
    assert counts["class"] == 8
    assert studio.cache(clear=True).shares == ()


def test_a_base_in_one_file_draws_and_says_what_was_left_out(tmp_path: Path):
    file = tmp_path / "model.safetensors"
    save_single_file(SD1.tiny(), file)
    with safe_open(file, framework="pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        metadata = opened.metadata()
    save_file({**tensors, "somebody.else": torch.ones(1)}, file, metadata)
    events = list(Studio(Store(tmp_path / "work")).generate(["a thing"], base=str(file), steps=1))
    notes = [event.text for event in events if isinstance(event, Note)]
    assert notes == ["model.safetensors has 1 tensors that no part reads, first somebody.else: left out"]
    assert isinstance(events[-1], Drawn)


def test_a_dry_run_needs_no_weights(tmp_path: Path):
    findings = Studio(Store(tmp_path)).doctor("sd1.5", rank=8)
    assert [finding.what for finding in findings][-1] == "sd1.5: LoRA"
    assert findings[-1].found.startswith("rank 8 on 160 layers")
