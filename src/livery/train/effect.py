"""Whether what is trained has an effect: how far its numbers moved, how much the answers changed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import Parameter

from livery.models.device import autocast
from livery.nouns import LiveryError
from livery.train.batches import Row, batches_of_step
from livery.train.learner import Learner

SAMPLED = 4096
"""Numbers of each parameter that are compared: a copy of all weights would be large."""
ROWS = 4
LEVELS = 64
"""The answers are compared at the middle one of so many noise levels."""


@dataclass(frozen=True)
class Effect:
    """`moved` is the root mean square change of the parameters; `changed` that of the denoiser's answer on
    fixed training rows, as a share of the answer's own.
    """

    moved: float
    changed: float


def beginning(params: Mapping[str, Parameter]) -> dict[str, Tensor]:
    """What `measure` compares with, to be taken when nothing has been learned yet."""
    return {name: _sampled(param) for name, param in params.items()}


def measure(learner: Learner, start: Mapping[str, Tensor]) -> Effect:
    """The effect by now. The answers are compared in the same precision as in training."""
    changes = [(_sampled(param) - start[name]).square() for name, param in learner.params.items()]
    moved = float(torch.cat(changes).mean().sqrt())
    with learner.looking():
        tuned = _answer(learner)
        learner.attached.scale(0)
        try:
            base = _answer(learner)
        finally:
            learner.attached.scale(1)
    return Effect(moved, float((tuned - base).norm() / base.norm().clamp(min=1e-12)))


def require(effect: Effect, step: int) -> None:
    """Raises LiveryError that names what to check when there is no effect at all."""
    if effect.moved == 0:
        raise LiveryError(
            f"after {step} steps nothing that is trained has moved: check that learning_rate is not next to "
            "0, that loss weights (of photos, prior.weight) are not 0, and that masks show something"
        )
    if effect.changed == 0:
        raise LiveryError(
            f"after {step} steps what is trained has moved, but the base answers as if it were not there: "
            "check that the trigger or the new words stand in the captions, that targets name layers that "
            "are used, and that alpha is not next to 0"
        )


def _sampled(param: Parameter) -> Tensor:
    return param.detach().flatten()[:SAMPLED].float().cpu().clone()


def _rows(learner: Learner) -> list[Row]:
    """Some subject rows of the first steps that share a size, with captions where there are any."""
    steps = range(min(8, learner.recipe.steps))
    rows = [row for step in steps for batch in batches_of_step(learner.plan, step) for row in batch]
    own = [row for row in rows if not row.prior] or rows
    own = [row for row in own if row.caption] or own
    return [row for row in own if row.size[4:] == own[0].size[4:]][:ROWS]


@torch.no_grad()
def _answer(learner: Learner) -> Tensor:
    rows = _rows(learner)
    clean = learner.encodings.latents(rows)
    t = learner.law.levels(LEVELS)[LEVELS // 2].expand(len(rows)).to(clean.device)
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0)).to(clean.device)
    with autocast(clean.device, learner.recipe.precision, clean[0, 0].numel()):
        prompts = learner.encodings.prompts(rows)
        return learner.backbone.predict(learner.law.mix(clean, noise, t), t, prompts).float()
