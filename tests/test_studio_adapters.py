"""Files of other tools, and tools on adapters, through Studio and the command line."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from livery import __version__
from livery.cli import app
from livery.models.sd1 import SD1
from livery.nouns import (
    Adapter,
    AdapterCard,
    Checked,
    Dataset,
    LiveryError,
    LowRankSpec,
    Made,
    Note,
    Photo,
    Recipe,
    Reduced,
    Written,
)
from livery.store import Store
from livery.studio import Studio
from livery.tuners.adapter_file import adapter_bytes
from livery.tuners.lowrank import LowRank

SPEC = LowRankSpec(rank=4, alpha=2)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with one adapter, "acme", on a tiny base beside it."""
    home = tmp_path_factory.mktemp("home")
    base = SD1.tiny()
    base.save(home / "base")
    attached = LowRank.build(SPEC).attach(base)
    generator = torch.Generator().manual_seed(0)
    state = {n: 0.1 * torch.randn(t.shape, generator=generator) for n, t in attached.state().items()}
    attached.undo()
    store = Store(home / "work")
    photo = Photo(sha256=store.put_blob(b"x"), captions=("fox, red",), width=1, height=1, split="train")
    dataset = Dataset(name="acme", photos=(photo,))
    store.put(dataset)
    card = AdapterCard(
        recipe=Recipe(base=str(home / "base"), tuners=(SPEC,), trigger="acme"),
        family="sd1",
        base_sha256=base.sha256,
        dataset=dataset.id,
        trigger_words=("acme",),
        livery_version=__version__,
        step=1,
    )
    adapter = Adapter(sha256=store.put_blob(adapter_bytes(card, state)), card=card)
    store.put(adapter)
    store.alias("acme", adapter.id)
    return home


@pytest.fixture
def studio(home: Path) -> Studio:
    return Studio(Store(home / "work"), device="cpu")


def test_out_as_kohya_and_in_again_it_is_the_same(studio: Studio, home: Path, tmp_path: Path) -> None:
    path = tmp_path / "acme.safetensors"
    events = list(studio.export("acme", path, format="kohya", tags=True))
    checked = next(event for event in events if isinstance(event, Checked))
    assert (checked.difference, checked.unmatched) == (0, ())
    assert events[-1] == Written(what="adapter for kohya", path=str(path))
    note, made = studio.import_adapter(path, base=str(home / "base"))
    assert isinstance(note, Note)
    assert isinstance(made, Made)
    assert note.text == f"{checked.matched} tensors matched, 0 not"
    card = made.adapter.card
    assert card.recipe.tuners == (SPEC,)
    assert card.origin == "imported from acme.safetensors, the base as named"
    assert card.recipe.trigger == "acme"
    assert card.dataset is None
    again = tmp_path / "again.safetensors"
    list(studio.export(made.adapter.id, again, format="kohya"))
    first, second = load_file(path), load_file(again)
    assert all(torch.equal(first[name], second[name]) for name in first)
    with pytest.raises(LiveryError, match="was not trained here"):
        list(studio.evaluate(made.adapter.id))


def test_a_file_of_liverys_own_comes_in_with_its_card(studio: Studio, home: Path, tmp_path: Path) -> None:
    list(studio.export("acme", tmp_path / "acme.safetensors"))
    *_, made = studio.import_adapter(tmp_path / "acme.safetensors", base=str(home / "base"))
    assert isinstance(made, Made)
    assert made.adapter == studio.store.get(Adapter, "acme")


def test_merge_and_resize_make_adapters(studio: Studio) -> None:
    *_, merged = studio.merge(["acme", "acme"], weights=[0.5, 0.25])
    assert isinstance(merged, Made)
    reduced, resized = studio.resize(merged.adapter.id, 4)
    assert isinstance(reduced, Reduced)
    assert isinstance(resized, Made)
    assert reduced.kept == pytest.approx(1, abs=1e-5)  # two times the same adapter has its rank
    assert resized.adapter in studio.list("Adapter")
    with pytest.raises(LiveryError, match="2 adapters and 1 weights"):
        list(studio.merge(["acme", "acme"], weights=[1]))


def test_merged_into_a_model_and_extracted_again(studio: Studio, home: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    events = list(studio.merge(["acme"], into=path))
    assert events[-1] == Written(what="checkpoint", path=str(path))
    reduced, made = studio.extract(str(path), base=str(home / "base"), rank=4)
    assert isinstance(reduced, Reduced)
    assert isinstance(made, Made)
    assert reduced.kept > 0.999
    assert made.adapter.card.base_sha256 == studio.store.get(Adapter, "acme").card.base_sha256


def test_the_commands_say_what_was_checked(home: Path, tmp_path: Path) -> None:
    run = CliRunner()
    work = ["--workspace", str(home / "work")]
    path = tmp_path / "a.safetensors"
    out = run.invoke(
        app, ["export", "acme", str(path), "-f", "kohya", "--rank", "2", "--dtype", "fp16", *work]
    )
    assert out.exit_code == 0, out.output
    assert "tensors matched, 0 not" in out.output.replace("\n", " ")
    assert "kept at rank 2" in out.output
    base = ["--base", str(home / "base")]
    out = run.invoke(app, ["import-adapter", str(path), *base, "--json", *work])
    assert out.exit_code == 0, out.output
    events = [json.loads(line) for line in out.output.splitlines()]
    assert [event["kind"] for event in events] == ["note", "made"]
    out = run.invoke(app, ["merge", "acme", "acme", "--weight", "1", "--weight", "2", "--json", *work])
    assert json.loads(out.output.splitlines()[-1])["adapter"]["card"]["origin"].startswith("merged from 1 x ")
    out = run.invoke(app, ["resize", "acme", "--rank", "1", "--json", *work])
    assert [json.loads(line)["kind"] for line in out.output.splitlines()] == ["reduced", "made"]
    out = run.invoke(app, ["extract", str(home / "base"), *base, *work])
    assert isinstance(out.exception, LiveryError)
    assert "the same weights" in str(out.exception)
