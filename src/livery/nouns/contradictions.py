"""What in a recipe cannot be meant: sentences that name the keys and say what to do."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from livery.nouns.base import Noun
from livery.nouns.tuning import FullSpec, LowRankSpec, TokensSpec

if TYPE_CHECKING:
    from livery.nouns.recipe import Recipe


def contradiction(recipe: Recipe) -> str | None:
    """The first thing that the recipe asks for and forbids at once; none when there is nothing."""
    return next(
        itertools.chain(
            _idle_keys(recipe), _about_tuners(recipe), _about_words(recipe), _about_the_run(recipe)
        ),
        None,
    )


def doubts(recipe: Recipe) -> Iterator[str]:
    """What is allowed but seldom meant, one sentence each."""
    yield from _odd_rates(recipe)
    if recipe.steps_per_photo is None and recipe.optimizer.warmup_steps >= recipe.steps:
        yield (
            f"optimizer.warmup_steps {recipe.optimizer.warmup_steps} is not below steps {recipe.steps}: "
            "the learning rate never gets to where it should."
        )
    looks = recipe.stop.patience * recipe.validate_every
    if recipe.steps_per_photo is None and looks >= recipe.steps:
        yield (
            f"stop.patience {recipe.stop.patience} x validate_every {recipe.validate_every} is not below "
            f"steps {recipe.steps}: the run cannot end early."
        )


# ----------------------------------------------------------------------------- contradictions


def _idle_keys(recipe: Recipe) -> Iterator[str]:
    """Keys that were set though nothing reads them."""
    tags = recipe.captions.shuffle_tags or recipe.captions.tag_dropout > 0
    readers = (
        ("loss", "min_snr_gamma", recipe.loss.weighting == "min-snr", "loss.weighting is 'min-snr'"),
        ("loss", "huber_delta", recipe.loss.kind == "huber", "loss.kind is 'huber'"),
        ("noise", "logit_mean", recipe.noise.timesteps != "uniform", "noise.timesteps is 'logit-normal'"),
        ("noise", "logit_std", recipe.noise.timesteps != "uniform", "noise.timesteps is 'logit-normal'"),
        (
            "optimizer",
            "restarts",
            recipe.optimizer.schedule == "cosine-restarts",
            "optimizer.schedule is 'cosine-restarts'",
        ),
        ("captions", "keep_tags", tags, "captions.shuffle_tags or captions.tag_dropout is set"),
        ("pictures", "bucket_step", recipe.pictures.buckets, "pictures.buckets is true"),
        ("pictures", "max_ratio", recipe.pictures.buckets, "pictures.buckets is true"),
        ("pictures", "unmasked_weight", recipe.pictures.masks == "loss", "pictures.masks is 'loss'"),
        ("prior", "prompt", recipe.prior.kind != "none", "prior.kind is 'photos' or 'prediction'"),
        ("prior", "weight", recipe.prior.kind != "none", "prior.kind is 'photos' or 'prediction'"),
        ("stop", "patience", recipe.validate_every > 0, "validate_every is above 0"),
    )
    for section, key, read, when in readers:
        spec: Noun = getattr(recipe, section)
        if not read and getattr(spec, key) != type(spec).model_fields[key].default:
            yield f"{section}.{key} is read only where {when}: set that, or leave {key} out"


def _about_tuners(recipe: Recipe) -> Iterator[str]:
    full = [each for each in recipe.tuners if isinstance(each, FullSpec)]
    low_rank = [each for each in recipe.tuners if isinstance(each, LowRankSpec)]
    weights = recipe.memory.weights
    if full and weights in ("int8", "int4"):
        yield f"memory.weights '{weights}' freezes the base, kind 'full' trains it"
    if full and weights == "fp16":
        yield "memory.weights 'fp16' loses the small steps of kind 'full': take 'bf16' or 'fp32'"
    if any(each.dora for each in low_rank) and weights in ("int8", "int4"):
        yield (
            f"dora takes the lengths of the base's weights, which memory.weights '{weights}' only keeps "
            "roughly: leave one of them out"
        )
    kinds = [each.kind for each in low_rank]
    for each in low_rank:
        if kinds.count(each.kind) > 1 and each.targets is None:
            yield (
                f"kind '{each.kind}' is named twice, once without targets: give each targets of its own, by "
                "which an adapter file can tell them apart"
            )
    if len(full) > 1:
        yield "kind 'full' is named twice: one holds all that the other could"
    if full and low_rank and any(each.targets is None for each in full):
        yield (
            f"kinds 'full' and '{low_rank[0].kind}' would train the same layers: keep one, or give 'full' "
            "targets of its own"
        )
    if recipe.memory.fused_backward and not full:
        yield "memory.fused_backward is for kind 'full' alone: leave it out"
    if recipe.memory.fused_backward and recipe.accumulate > 1:
        yield "memory.fused_backward moves weights in each backward pass: set accumulate to 1"
    if recipe.optimizer.ema and recipe.memory.fused_backward:
        yield "optimizer.ema and memory.fused_backward do not go together: keep one of them"


def _about_words(recipe: Recipe) -> Iterator[str]:
    """New words, the trigger, and captions that are tags."""
    specs = [each for each in recipe.tuners if isinstance(each, TokensSpec)]
    words = [word for spec in specs for word in spec.tokens]
    for one, other in itertools.permutations(words, 2):
        if one in other:
            yield f"the new word '{one}' is part of '{other}': choose words of which none holds another"
    if words and not any(word in recipe.trigger for word in words):
        for word in words:
            if recipe.trigger and _bare(word) == _bare(recipe.trigger):
                yield f"trigger '{recipe.trigger}' is not the new word: write trigger = '{word}'"
    if recipe.captions.shuffle_tags:
        for word in words:
            if recipe.captions.separator in word:
                yield f"the new word '{word}' holds captions.separator and would be shuffled apart"
    if words and recipe.captions.dropout == 1:
        yield "captions.dropout 1 leaves no caption that new words could stand in: lower it"


def _bare(word: str) -> str:
    return re.sub(r"[\W_]+", "", word.casefold())


def _about_the_run(recipe: Recipe) -> Iterator[str]:
    if recipe.prior.kind != "none" and not recipe.prior.prompt:
        yield "prior.prompt is empty: name the class, such as 'a dog'"
    if recipe.prior.kind != "none" and all(isinstance(each, TokensSpec) for each in recipe.tuners):
        yield "prior keeps what weights know, kind 'tokens' changes none: leave [prior] out"
    if recipe.noise.pyramid and recipe.noise.offset:
        yield "noise.pyramid and noise.offset both strengthen coarse noise: keep one of them"
    if recipe.min_steps > recipe.max_steps:
        yield f"min_steps {recipe.min_steps} is above max_steps {recipe.max_steps}"
    if recipe.optimizer.betas and recipe.optimizer.kind == "adafactor":
        yield "optimizer.betas: adafactor has none, leave it out"


# ----------------------------------------------------------------------------- doubts


def _odd_rates(recipe: Recipe) -> Iterator[str]:
    prodigy = recipe.optimizer.kind == "prodigy"
    for key, rate in _rates(recipe):
        if prodigy and not 0.1 <= rate <= 10:
            yield f"{key} is {rate:g}, but prodigy finds the rate by itself and multiplies it: 1 is usual."
        if not prodigy and rate >= 0.1:
            yield f"{key} is {rate:g}, which only prodigy takes; {recipe.optimizer.kind} takes below 0.01."
    if prodigy:
        return
    for index, spec in enumerate(recipe.tuners):
        if isinstance(spec, LowRankSpec):
            yield from _weak_update(index, spec, spec.learning_rate or recipe.learning_rate)
        elif isinstance(spec, FullSpec) and (spec.learning_rate or recipe.learning_rate) > 1e-4:
            rate = spec.learning_rate or recipe.learning_rate
            yield f"tuners.{index}: {rate:g} is high for kind 'full', which is usually given 1e-6 to 1e-5."


def _weak_update(index: int, spec: LowRankSpec, rate: float) -> Iterator[str]:
    """LoRA's step grows with learning rate x scale; copied rates often forget the scale."""
    scale = scale_of(spec)
    if spec.kind != "oft" and scale * rate < 5e-6:
        yield (
            f"tuners.{index}: alpha / rank is {scale:.3g}, so learning_rate {rate:g} acts like "
            f"{scale * rate:.2g}: little may be learned. Raise one of them."
        )
    for tower, own in spec.towers.items():
        if own > rate:
            yield (
                f"tuners.{index}: {tower} learns at {own:g}, faster than the denoiser at {rate:g}: text "
                "encoders are usually given a half to a tenth."
            )


def scale_of(spec: LowRankSpec) -> float:
    """What the update is multiplied with: alpha / rank, or alpha / sqrt(rank) for rsLoRA."""
    alpha = spec.rank if spec.alpha is None else spec.alpha
    return alpha / (math.sqrt(spec.rank) if spec.rslora else spec.rank)


def _rates(recipe: Recipe) -> Iterator[tuple[str, float]]:
    """Every learning rate that acts, with its key."""
    own = [spec.learning_rate for spec in recipe.tuners]
    if None in own:
        yield "learning_rate", recipe.learning_rate
    for index, spec in enumerate(recipe.tuners):
        if spec.learning_rate is not None:
            yield f"tuners.{index}.learning_rate", spec.learning_rate
        if isinstance(spec, LowRankSpec | FullSpec):
            for tower, rate in spec.towers.items():
                yield f"tuners.{index}.towers.{tower}", rate
