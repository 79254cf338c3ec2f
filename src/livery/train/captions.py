"""Captions to prompts: tags shuffled and dropped, the trigger placed; the same forms in every run.

Each caption has a fixed number of forms, worked out from its text alone, and a row picks one. So
the encodings of all forms can be cached, once, for all runs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch

from livery.nouns import CaptionsSpec, Photo, Recipe


def random_of(*names: int | str) -> torch.Generator:
    """A CPU generator whose seed is the hash of its names, so streams never run into each other."""
    digest = hashlib.sha256("/".join(str(name) for name in names).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def plain(photo: Photo, recipe: Recipe) -> str:
    """A photo's first caption as it was written, with the trigger: what validation asks."""
    return placed(photo.caption, recipe)


def form(caption: str, number: int, recipe: Recipe) -> str:
    """Form `number` of a caption, below `forms(recipe)`: the text a row is trained on."""
    return placed(_varied(caption, number, recipe.captions), recipe)


def forms(recipe: Recipe) -> int:
    """How many forms each caption has; 1 when nothing varies."""
    varies = recipe.captions.shuffle_tags or recipe.captions.tag_dropout
    return recipe.captions.variants if varies else 1


def texts_of(photo: Photo, recipe: Recipe) -> Iterator[str]:
    """Every text that a row of this photo may be trained on, the dropped caption aside."""
    for caption in photo.captions or ("",):
        for number in range(forms(recipe)):
            yield form(caption, number, recipe)


def placed(caption: str, recipe: Recipe) -> str:
    """The caption with the trigger words first or last, unless they are in it already (in any case)."""
    trigger = recipe.trigger
    if not trigger or trigger.casefold() in caption.casefold():
        return caption
    if not caption:
        return trigger
    first = recipe.captions.trigger_place == "first"
    return f"{trigger}, {caption}" if first else f"{caption}, {trigger}"


def _varied(caption: str, number: int, spec: CaptionsSpec) -> str:
    """The first `keep_tags` tags stay in front; the others are shuffled, then each may be left out."""
    if not (spec.shuffle_tags or spec.tag_dropout):
        return caption
    tags = [tag.strip() for tag in caption.split(spec.separator) if tag.strip()]
    kept, others = tags[: spec.keep_tags], tags[spec.keep_tags :]
    random = random_of("form", number, caption)
    if spec.shuffle_tags:
        others = [others[place] for place in torch.randperm(len(others), generator=random).tolist()]
    stays = torch.rand(len(others), generator=random) >= spec.tag_dropout
    others = [tag for tag, stay in zip(others, stays.tolist(), strict=True) if stay]
    return _joint(spec.separator).join(kept + others)


def _joint(separator: str) -> str:
    return f"{separator} " if separator.strip() == separator else separator
