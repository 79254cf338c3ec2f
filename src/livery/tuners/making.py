"""Adapters made from adapters or from models: card and tensors, for `write_adapter`, and what was kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from livery.models.backbone import Backbone
from livery.nouns import AdapterCard, LiveryError, Reduced
from livery.tuners import tools
from livery.tuners.delta import Layer, base_weights, layers, state_of, words
from livery.tuners.derived import derived_card


@dataclass(frozen=True)
class Held:
    """An adapter at hand: what to call it, its card and its tensors."""

    name: str
    card: AdapterCard
    state: Mapping[str, Tensor]

    @property
    def layers(self) -> dict[str, Layer]:
        return layers(self.card.recipe.tuners, self.state)


Result = tuple[AdapterCard, dict[str, Tensor], Reduced | None]


def merge_adapters(
    items: Sequence[tuple[Held, float]], backbone: Backbone, base: str, rank: int | None = None
) -> Result:
    """The weighted sum of adapters as one LoRA, exactly or of a given rank; new words are taken over.

    Raises LiveryError for adapters of another base, and when two of them teach the same word.
    """
    check_bases([held for held, _ in items], backbone)
    found, report = tools.merge(
        [(held.layers, weight) for held, weight in items], rank, base_weights(backbone)
    )
    vectors: dict[tuple[str, str], Tensor] = {}
    for held, _ in items:
        for key, rows in words(held.state).items():
            if key in vectors:
                raise LiveryError(f"two of the adapters teach the word {key[1]}: keep one of them")
            vectors[key] = rows
    told = " and ".join(f"{weight:g} x {held.name}" for held, weight in items)
    card = derived_card(
        found,
        vectors,
        backbone,
        base=base,
        origin=f"merged from {told}" + (f" at rank {rank}" if rank else ""),
        like=[held.card for held, _ in items],
    )
    return card, state_of(found, vectors), report


def resize_adapter(held: Held, backbone: Backbone, base: str, rank: int) -> Result:
    """An adapter at a lower rank, as plain LoRA; its new words stay.

    Raises LiveryError when it has no layers, or is plain LoRA of no higher rank already.
    """
    check_bases([held], backbone)
    if not held.layers:
        raise LiveryError(f"adapter {held.name} teaches words only, which have no rank")
    if all(each.kind == "lora" and not each.is_dora and each.rank <= rank for each in held.layers.values()):
        raise LiveryError(
            f"adapter {held.name} is plain LoRA with no layer above rank {rank}: give a lower one"
        )
    found, report = tools.resize(held.layers, rank, base_weights(backbone))
    vectors = words(held.state)
    origin = f"resized from {held.name} to rank {rank}"
    card = derived_card(found, vectors, backbone, base=base, origin=origin, like=[held.card])
    return card, state_of(found, vectors), report


def extract_adapter(
    tuned: Backbone, tuned_name: str, backbone: Backbone, base: str, rank: int, *, towers: bool = True
) -> Result:
    """What one model learnt over another, as a LoRA for the latter."""
    found, report = tools.extract(tuned, backbone, rank, towers=towers)
    origin = f"extracted from {tuned_name} over {base} at rank {rank}"
    return derived_card(found, {}, backbone, base=base, origin=origin), state_of(found), report


def check_bases(items: Sequence[Held], backbone: Backbone) -> None:
    """Raises LiveryError when an adapter was made for another base than this."""
    for held in items:
        if held.card.base_sha256 != backbone.sha256:
            raise LiveryError(
                f"adapter {held.name} was made for the base {held.card.base_sha256[:12]} "
                f"({held.card.recipe.base}), this one is {backbone.sha256[:12]}: adapters of one base go "
                "together"
            )
