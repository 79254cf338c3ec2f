"""Adapters that were not trained here: their recipe, as far as the tensors tell it, and their card."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from peft.tuners.lokr.layer import factorization
from torch import Tensor

import livery
from livery.models.backbone import Backbone
from livery.nouns import AdapterCard, LowRankSpec, Recipe, TokensSpec, TunerSpec
from livery.tuners.delta import Layer
from livery.tuners.formats.diffusers_lora import neat

Words = Mapping[tuple[str, str], Tensor]


def derived_card(
    found: Mapping[str, Layer],
    words: Words,
    backbone: Backbone,
    *,
    base: str,
    origin: str,
    like: Sequence[AdapterCard] = (),
    trigger: str = "",
) -> AdapterCard:
    """A card that says how the adapter came about; its recipe tells the tuners, and nothing of a training.

    `like` is the adapters that it was made from: their trigger words, licences and credits go with it.
    """
    triggers = _all(card.recipe.trigger for card in like) if like else _all([trigger])
    datasets = {card.dataset for card in like}
    return AdapterCard(
        recipe=Recipe(
            base=base, family=backbone.family, tuners=specs(found, words), trigger=", ".join(triggers)
        ),
        family=backbone.family,
        base_sha256=backbone.sha256,
        dataset=datasets.pop() if len(datasets) == 1 else None,
        origin=origin,
        trigger_words=_all(word for card in like for word in card.trigger_words) if like else triggers,
        licences=_all(each for card in like for each in card.licences),
        attributions=_all(each for card in like for each in card.attributions),
        livery_version=livery.__version__,
        step=0,
    )


def _all(values: Iterable[str]) -> tuple[str, ...]:
    """Each once, without empty ones."""
    return tuple(dict.fromkeys(filter(None, values)))


def specs(found: Mapping[str, Layer], words: Words) -> tuple[TunerSpec, ...]:
    """Tuners that attach exactly these tensors with exactly these scales."""
    kinds = dict.fromkeys(layer.kind for layer in found.values())
    tuners: list[TunerSpec] = []
    if words:
        tuners.append(_tokens(words))
    for kind in kinds:
        mine = {name: layer for name, layer in found.items() if layer.kind == kind}
        tuners.append(_low_rank(mine))
    return tuple(tuners)


def _low_rank(mine: Mapping[str, Layer]) -> LowRankSpec:
    """The usual rank and alpha, and patterns with whole names for layers that have others."""
    first = next(iter(mine.values()))
    ranks = {name: _rank(layer) for name, layer in mine.items()}
    if first.kind == "oft":
        return LowRankSpec(kind="oft", rank=Counter(ranks.values()).most_common(1)[0][0])
    alphas = {name: neat(layer.scale * ranks[name]) for name, layer in mine.items()}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    own_alpha = all(alphas[name] == ranks[name] for name in mine)
    alpha = None if own_alpha else Counter(alphas.values()).most_common(1)[0][0]
    return LowRankSpec.model_validate(
        {
            "kind": first.kind,
            "rank": rank,
            "alpha": alpha,
            "ranks": _patterns(ranks, rank),
            "alphas": {} if alpha is None else _patterns(alphas, alpha),
            "dora": first.is_dora,
            "factor": _factor(mine) if first.kind == "lokr" else None,
        }
    )


def _rank(layer: Layer) -> int:
    """OFT: the blocks' side. LoKr of two whole factors: the least at which the second one is whole."""
    if layer.kind == "oft":
        return round((1 + (1 + 8 * layer.leaves["oft_R.weight"].shape[1]) ** 0.5) / 2)
    return layer.rank or max(layer.leaves["lokr_w2"].shape[:2])


def _factor(mine: Mapping[str, Layer]) -> int | None:
    """The setting from which peft makes small factors of these sizes; none is the most even split."""
    sizes = {max(layer.leaves["lokr_w1"].shape) for layer in mine.values()}
    for factor in (-1, *sorted(sizes)):
        if all(_splits_so(layer.leaves, factor) for layer in mine.values()):
            return None if factor == -1 else factor
    return max(sizes)


def _splits_so(leaves: Mapping[str, Tensor], factor: int) -> bool:
    small = leaves["lokr_w1"].shape
    whole = leaves.get("lokr_w2")
    large = whole.shape[:2] if whole is not None else leaves["lokr_w2_a"].shape[:1]
    return all(factorization(a * b, factor)[0] == a for a, b in zip(small, large, strict=False))


def _patterns(values: Mapping[str, float], usual: float) -> dict[str, float]:
    """One expression for all layers that share an unusual value."""
    groups: dict[float, list[str]] = {}
    for name, value in values.items():
        if value != usual:
            groups.setdefault(value, []).append(re.escape(name))
    return {"|".join(names): value for value, names in groups.items()}


def _tokens(words: Words) -> TokensSpec:
    """A word's own letters are what it starts from in encoders that did not learn it."""
    towers = tuple(dict.fromkeys(tower for tower, _ in words))
    names = dict.fromkeys(word for _, word in words)
    return TokensSpec(
        tokens={word: re.sub(r"[^\w ]+", " ", word).strip() or "thing" for word in names},
        vectors=max(vectors.shape[0] for vectors in words.values()),
        towers=towers,
        keep_norm=False,
    )
