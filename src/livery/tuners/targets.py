"""Regular expressions over whole names, and errors that say which names there are."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache

from torch import nn

from livery.models.backbone import Backbone
from livery.nouns import LiveryError


@cache
def compiled(regex: str, key: str = "targets") -> re.Pattern[str]:
    """Raises LiveryError, led by the recipe's key, when it is not a regular expression."""
    try:
        return re.compile(regex)
    except re.error as error:
        raise LiveryError(f"{key}: {regex!r} is not a regular expression: {error}") from None


def nothing_matches(key: str, regex: str, what: str, names: Sequence[str]) -> LiveryError:
    """The error to raise when an expression matches none of the names; it shows a few of them."""
    some = ", ".join(names[:: max(1, len(names) // 4)][:5])
    return LiveryError(
        f"{key}: {regex!r} matches no {what}; it must match whole names, and there are {some} ..."
    )


def tower(backbone: Backbone, name: str) -> nn.Module:
    """A text encoder by name. Raises LiveryError that names those there are."""
    if name not in backbone.towers:
        raise LiveryError(
            f"towers: this base has no text encoder '{name}'; it has {', '.join(backbone.towers)}"
        )
    return backbone.towers[name]
