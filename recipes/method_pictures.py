"""Draw the pictures on the pages about methods: `python recipes/method_pictures.py [METHOD ...]`.

Trains each method's preset on the built-in model with the sample brand's 40 pictures, on the CPU, and draws
prompts that were not among them with the base and with the result, same seeds. Takes minutes per method.
"""

from __future__ import annotations

import io
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw

from livery import presets
from livery.nouns import Adapter, Drawn, Ingested, Trained
from livery.starter import brand_folder
from livery.store import Store
from livery.studio import Studio

IMAGES = Path(__file__).parents[1] / "docs" / "images"
METHODS = ("lora", "textual-inversion", "pivotal", "full")
PROMPTS = ("a wolf", "a fox", "an owl", "a shark", "a butterfly", "a trophy")
SIDE, EDGE = 96, 6


def row(studio: Studio, prompts: Sequence[str], adapter: Adapter | None) -> list[Image.Image]:
    """One picture per prompt, seed 0."""
    events = studio.generate(prompts, adapter=adapter.id if adapter else None, seed=0)
    drawn = [studio.store.read_blob(event.sha256) for event in events if isinstance(event, Drawn)]
    return [Image.open(io.BytesIO(png)).convert("RGB") for png in drawn]


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
    recipe = presets.read(f"starter-{method}")
    trained = next(e for e in studio.train(recipe, dataset.id) if isinstance(e, Trained))
    sheet = grid({"base": row(studio, PROMPTS, None), "tuned": row(studio, PROMPTS, trained.adapter)})
    sheet.save(IMAGES / f"methods-{method}.png", optimize=True)


if __name__ == "__main__":
    for each in sys.argv[1:] or METHODS:
        with tempfile.TemporaryDirectory() as place:
            draw(each, Path(place))
