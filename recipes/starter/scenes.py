"""Scenes: drawings placed on a background, with the caption that says what is there.

A scene is one object, two to four of the same, or two different ones side by side, so that
prompts can be tested for concept, style, colour, count and position.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from recipes.starter.emoji import Concept

BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (255, 255, 255),
    "light grey": (214, 216, 220),
    "black": (24, 24, 28),
    "red": (224, 84, 78),
    "orange": (246, 170, 84),
    "yellow": (252, 222, 110),
    "green": (130, 200, 128),
    "blue": (112, 172, 236),
    "purple": (172, 136, 220),
    "pink": (248, 180, 200),
}
NUMBERS = {2: "two", 3: "three", 4: "four"}
# Places of n objects: (x, y) of each centre and the side of each, in shares of the picture.
COUNT_PLACES = {
    2: [(0.26, 0.5, 0.46), (0.74, 0.5, 0.46)],
    3: [(0.5, 0.27, 0.44), (0.26, 0.73, 0.44), (0.74, 0.73, 0.44)],
    4: [(0.27, 0.27, 0.44), (0.73, 0.27, 0.44), (0.27, 0.73, 0.44), (0.73, 0.73, 0.44)],
}
PAIR_PLACES = {
    "left of": [(0.26, 0.5, 0.46), (0.74, 0.5, 0.46)],
    "right of": [(0.74, 0.5, 0.46), (0.26, 0.5, 0.46)],
    "above": [(0.5, 0.26, 0.46), (0.5, 0.74, 0.46)],
    "below": [(0.5, 0.74, 0.46), (0.5, 0.26, 0.46)],
}


@dataclass(frozen=True)
class Scene:
    """What is drawn where: `objects` are (concept, x, y, side), places in shares of the picture."""

    style: str
    background: str
    objects: tuple[tuple[int, float, float, float], ...]
    relation: str = ""


def paint(drawings: Tensor, scene: Scene, size: int) -> Tensor:
    """uint8 [N, 4, R, R] drawings of one style -> uint8 [3, size, size] picture of the scene."""
    colour = torch.tensor(BACKGROUNDS[scene.background], dtype=torch.float32) / 255
    canvas = colour[:, None, None].expand(3, size, size).clone()
    for concept, x, y, side in scene.objects:
        pixels = max(8, round(side * size))
        top, left = round(y * size - pixels / 2), round(x * size - pixels / 2)
        top, left = min(max(top, 0), size - pixels), min(max(left, 0), size - pixels)
        rgba = drawings[concept].float() / 255
        rgba = torch.cat([rgba[:3] * rgba[3:], rgba[3:]])  # premultiplied, or edges darken
        small = functional.interpolate(
            rgba[None], size=(pixels, pixels), mode="bilinear", antialias=True, align_corners=False
        )[0]
        window = canvas[:, top : top + pixels, left : left + pixels]
        window.mul_(1 - small[3:]).add_(small[:3])
    return (canvas.clamp(0, 1) * 255).round().to(torch.uint8)


def single(rng: random.Random, concept: int, style: str) -> Scene:
    """One object near the middle; half of the time on white."""
    side = rng.uniform(0.84, 0.96)
    room = (1 - side) / 2
    x, y = 0.5 + rng.uniform(-room, room), 0.5 + rng.uniform(-room, room)
    background = "white" if rng.random() < 0.6 else rng.choice(list(BACKGROUNDS))
    return Scene(style, background, ((concept, x, y, side),))


def several(rng: random.Random, concept: int, style: str) -> Scene:
    places = COUNT_PLACES[rng.choice([2, 3, 4])]
    background = "white" if rng.random() < 0.6 else rng.choice(list(BACKGROUNDS))
    return Scene(style, background, tuple((concept, *place) for place in places))


def pair(rng: random.Random, concept: int, other: int, style: str) -> Scene:
    relation = rng.choice(list(PAIR_PLACES))
    first, second = PAIR_PLACES[relation]
    background = "white" if rng.random() < 0.6 else rng.choice(list(BACKGROUNDS))
    return Scene(style, background, ((concept, *first), (other, *second)), relation)


def article(name: str) -> str:
    return f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"


def plural(name: str) -> str:
    if name.endswith(("s", "sh", "ch", "x", "z")):
        return name if name.endswith("s") else name + "es"
    if name.endswith("y") and name[-2] not in "aeiou":
        return name[:-1] + "ies"
    return name + "s"


def unknown_word(rng: random.Random) -> str:
    """A word of no meaning: triggers that adapters bring must not blur what the known words say."""
    return "".join(
        rng.choice("bcdfghjklmnprstvwz") + rng.choice("aeiou") for _ in range(rng.choice([2, 3, 4]))
    )


class Captions:
    """Writes captions: names from emojibase, sometimes a synonym that means this concept alone."""

    def __init__(self, concepts: list[Concept]) -> None:
        self.concepts = concepts
        uses = Counter(tag for concept in concepts for tag in set(concept.tags))
        labels = {concept.label for concept in concepts}
        self.synonyms = [
            [tag for tag in c.tags if uses[tag] == 1 and tag not in labels and tag.isascii()]
            for c in concepts
        ]

    def name(self, rng: random.Random, concept: int) -> str:
        synonyms = self.synonyms[concept]
        if synonyms and rng.random() < 0.12:
            return rng.choice(synonyms)
        return self.concepts[concept].label

    def caption(self, rng: random.Random, scene: Scene) -> str:
        first = self.name(rng, scene.objects[0][0])
        if scene.relation:
            second = self.name(rng, scene.objects[1][0])
            what = f"{article(first)} {scene.relation} {article(second)}"
        elif len(scene.objects) > 1:
            what = f"{NUMBERS[len(scene.objects)]} {plural(first)}"
        else:
            what = article(first) if rng.random() < 0.8 else first
        # White is the default of icons: name it only sometimes.
        if scene.background != "white" or rng.random() < 0.3:
            what += f" on {article(scene.background)} background"
        if rng.random() < 0.1:
            what += f", {unknown_word(rng)} style"
        return what if rng.random() < 0.1 else f"{what}, {scene.style} style"
