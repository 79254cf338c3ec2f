"""Draw the pictures on the pages about methods: `python recipes/method_pictures.py [METHOD ...]`.

Trains each method's preset on the built-in model with the sample brand's 40 pictures, on the CPU, and draws
prompts that were not among them with the base and with the result, same seeds. DreamBooth learns one thing
instead: the brand's black cat, on eight grounds. Takes minutes per method.
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
METHODS = ("lora", "dreambooth", "textual-inversion", "pivotal", "full")
PROMPTS = ("a wolf", "a fox", "an owl", "a shark", "a butterfly", "a trophy")
SUBJECT, CLASS, TRIGGER = "black-cat.png", "a cat", "zuvo"
GROUNDS = ("white", "#d6d8dc", "#e0544e", "#f6aa54", "#fcde6e", "#82c880", "#70acec", "#f8b4c8")
SIDE, EDGE = 96, 6


def row(
    studio: Studio, prompts: Sequence[str], adapter: Adapter | None, *, count: int = 1, trigger: bool = True
) -> list[Image.Image]:
    """`count` pictures per prompt, seeds from 0."""
    events = studio.generate(
        prompts, adapter=adapter.id if adapter else None, seed=0, count=count, trigger=trigger
    )
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


def learned(studio: Studio, photos: Path, method: str, trigger: str = "") -> Adapter:
    """The preset of the method, trained on a folder."""
    events = list(studio.ingest(photos, name="pictures"))
    dataset = next(event.dataset for event in events if isinstance(event, Ingested))
    recipe = presets.read(f"starter-{method}").model_copy(update={"trigger": trigger} if trigger else {})
    return next(e.adapter for e in studio.train(recipe, dataset.id) if isinstance(e, Trained))


def subject(folder: Path) -> Path:
    """The one thing that DreamBooth learns, at several sizes on several grounds, as a folder to ingest."""
    folder.mkdir()
    cat = Image.open(brand_folder() / "photos" / "train" / SUBJECT).convert("RGBA")
    for number, ground in enumerate(GROUNDS):
        side = 192 - 8 * number
        place = (192 - side) // 2
        photo = Image.new("RGB", (192, 192), ground)
        small = cat.resize((side, side), Image.Resampling.LANCZOS)
        photo.paste(small, (place, place), small)
        photo.save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(CLASS)
    return folder


def draw(method: str, folder: Path) -> None:
    studio = Studio(Store(folder / "workspace"))
    if method == "dreambooth":
        adapter = learned(studio, subject(folder / "subject"), method, TRIGGER)
        rows = {
            "base": row(studio, [CLASS], None, count=6),
            "trigger": row(studio, [CLASS], adapter, count=6),
            "class": row(studio, [CLASS], adapter, count=6, trigger=False),
        }
    else:
        adapter = learned(studio, brand_folder() / "photos", method)
        rows = {"base": row(studio, PROMPTS, None), "tuned": row(studio, PROMPTS, adapter)}
    grid(rows).save(IMAGES / f"methods-{method}.png", optimize=True)


if __name__ == "__main__":
    for each in sys.argv[1:] or METHODS:
        with tempfile.TemporaryDirectory() as place:
            draw(each, Path(place))
