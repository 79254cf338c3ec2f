"""Draw the pictures on the pages about methods: `python docs/method_pictures.py [METHOD ...]`.

Trains each method's preset on the built-in model with the sample brand's 40 pictures, on the CPU, and draws
prompts that were not among them with the base and with the result, same seeds. Takes minutes per method.
"""

from __future__ import annotations

import io
import sys
import tempfile
from pathlib import Path

from PIL import Image, ImageDraw

from livery import presets
from livery.nouns import Adapter, Dataset, Drawn, Ingested, Recipe, Trained
from livery.starter import brand_folder
from livery.store import Store
from livery.studio import Studio

IMAGES = Path(__file__).parent / "images"
METHODS = ("lora", "textual-inversion", "pivotal", "full", "dreambooth")
PROMPTS = ("a wolf", "a fox", "an owl", "a shark", "a butterfly", "a trophy")
SIDE, EDGE = 96, 6


def recipe_of(method: str) -> Recipe:
    """The preset, with the word and class of the sample brand filled in."""
    recipe = presets.read(f"starter-{method}")
    if method == "dreambooth":
        recipe = recipe.model_copy(update={"trigger": "acme cat"})
    return recipe


def row(studio: Studio, prompts: list[str], adapter: Adapter | None) -> list[Image.Image]:
    """One picture per prompt, seed 0."""
    events = studio.generate(prompts, adapter=adapter.id if adapter else None, seed=0)
    drawn = [studio.store.read_blob(event.sha256) for event in events if isinstance(event, Drawn)]
    return [Image.open(io.BytesIO(png)) for png in drawn]


def grid(rows: dict[str, list[Image.Image]]) -> Image.Image:
    """Rows with their names in front."""
    width = 70 + len(next(iter(rows.values()))) * (SIDE + EDGE)
    sheet = Image.new("RGB", (width, len(rows) * (SIDE + EDGE) + EDGE), "white")
    draw = ImageDraw.Draw(sheet)
    for y, (name, pictures) in enumerate(rows.items()):
        top = EDGE + y * (SIDE + EDGE)
        draw.text((EDGE, top + SIDE // 2 - 6), name, fill="black")
        for x, picture in enumerate(pictures):
            sheet.paste(picture.resize((SIDE, SIDE)), (70 + x * (SIDE + EDGE), top))
    return sheet


def draw(method: str, folder: Path) -> None:
    studio = Studio(Store(folder))
    events = list(studio.ingest(brand_folder() / "photos", name="OpenMoji"))
    dataset = next(event.dataset for event in events if isinstance(event, Ingested))
    prompts = list(PROMPTS)
    if method == "dreambooth":
        dataset = subject(studio, dataset)
        prompts = ["acme cat", "a red acme cat", "a cat", "a black cat", "a dog", "a fox"]
    trained = next(e for e in studio.train(recipe_of(method), dataset.id) if isinstance(e, Trained))
    sheet = grid({"base": row(studio, prompts, None), "tuned": row(studio, prompts, trained.adapter)})
    sheet.save(IMAGES / f"methods-{method}.png", optimize=True)


def subject(studio: Studio, dataset: Dataset) -> Dataset:
    """The brand's cats alone, called by a word of their own."""
    cats = [photo for photo in dataset.photos if "cat" in photo.caption.split()]
    named = tuple(photo.model_copy(update={"captions": ("acme cat",), "split": "train"}) for photo in cats)
    chosen = Dataset(name="cats", photos=named)
    studio.store.put(chosen)
    return chosen


if __name__ == "__main__":
    for each in sys.argv[1:] or METHODS:
        with tempfile.TemporaryDirectory() as place:
            draw(each, Path(place))
