"""The main job, end to end, on the starter that ships: `livery demo --quick`."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from livery.starter import brand_folder

SAFETENSORS_LIMIT = 45_000_000
STARTER = brand_folder().parent


@pytest.mark.slow
def test_demo_quick_goes_the_whole_way(tmp_path: Path) -> None:
    """Proves that every step works on the real starter; `benchmarks/demo.py` shows how well and how fast."""
    command = [sys.executable, "-m", "livery", "demo", "--quick", "--json", "-w", str(tmp_path / "w")]
    out = tmp_path / "demo"
    done = subprocess.run([*command, "-o", str(out)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    events = [json.loads(line) for line in done.stdout.splitlines()]
    dataset = next(event["dataset"] for event in events if event["kind"] == "ingested")
    splits = [photo["split"] for photo in dataset["photos"]]
    assert (splits.count("train"), splits.count("validation")) == (40, 20)
    assert {photo["licence"] for photo in dataset["photos"]} == {"CC-BY-SA-4.0"}
    looks = [event["loss"] for event in events if event["kind"] == "validation"]
    assert looks[-1] < looks[0], "forty steps must already bring the held-out loss down"
    report = next(event["report"] for event in events if event["kind"] == "evaluated")
    assert report["arms"] == ["base", "prompted", "tuned", "designers"]
    scores = {(score["metric"], score["arm"]): score["interval"]["value"] for score in report["scores"]}
    assert scores["likeness", "tuned"] > scores["likeness", "base"]
    page = (out / "report.html").read_text()
    assert "CC-BY-SA-4.0" in page
    assert len(list((out / "pictures" / "tuned").glob("*.png"))) == 12


def test_the_starter_is_light_and_says_what_it_is() -> None:
    weights = list(STARTER.rglob("*.safetensors"))
    assert len(weights) == 4  # autoencoder, text encoder, UNet, judge
    assert sum(file.stat().st_size for file in weights) <= SAFETENSORS_LIMIT
    assert all("_name_or_path" not in file.read_text() for file in STARTER.rglob("*.json"))
    measured = json.loads((STARTER / "measured.json").read_text())
    card = (STARTER / "README.md").read_text()
    for figure in (measured["vae_psnr_openmoji_db"], measured["style"], measured["concept_top5"]):
        shown = f"{figure:.0%}" if figure <= 1 else f"{figure:.1f}"
        assert shown in card, f"the model card does not tell the measured {figure}"


def test_the_sample_brand_was_kept_apart() -> None:
    """No picture of the brand stands in two of training, validation and truth."""
    names = {split: {file.name for file in brand_folder().rglob(f"{split}/*.png")} for split in
             ("train", "validation", "truth")}  # fmt: skip
    assert {split: len(found) for split, found in names.items()} == {
        "train": 40,
        "validation": 20,
        "truth": 100,
    }
    assert not names["train"] & names["truth"]
    assert not names["validation"] & names["truth"]
    assert not names["train"] & names["validation"]
