"""What the matrix is made of: every family's tiny model, every way to tune it, one short training of each.

A new family is here by itself; a new tuner is one line in `TUNERS`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from livery import plugins
from livery.models.backbone import Backbone
from livery.nouns import AdapterCard, FullSpec, LowRankSpec, Recipe, TokensSpec, TunerSpec
from livery.tuners.tuner import Attached, attach_all, build

FAMILIES: list[str] = list(plugins.families())
WORD = "<acme>"
NEW_WORD = TokensSpec(tokens={WORD: "ab"}, vectors=2, learning_rate=3e-2)
CONVOLUTIONS = r".*\.(conv1|conv2|conv|to_q)|pos_embed\.proj"

Specs = tuple[TunerSpec, ...]
TUNERS: dict[str, Callable[[Backbone], Specs]] = {
    "lora": lambda base: (LowRankSpec(rank=4, alpha=2),),
    "lora, rslora": lambda base: (LowRankSpec(rank=4, rslora=True),),
    "lora, dora": lambda base: (LowRankSpec(rank=4, dora=True),),
    "lora, convolutions": lambda base: (LowRankSpec(rank=2, targets=CONVOLUTIONS),),
    "lora, towers": lambda base: (LowRankSpec(rank=2, towers=dict.fromkeys(base.towers, 5e-3)),),
    "loha": lambda base: (LowRankSpec(kind="loha", rank=2),),
    "lokr": lambda base: (LowRankSpec(kind="lokr", rank=2),),
    "oft": lambda base: (LowRankSpec(kind="oft", rank=4),),
    "full": lambda base: (FullSpec(learning_rate=1e-3),),
    "tokens": lambda base: (NEW_WORD,),
    "tokens, lora": lambda base: (NEW_WORD, LowRankSpec(rank=4)),
}
STEPS = 4
PLAIN = ("a fox", "")
SPOKEN = (f"{WORD} fox",)


@dataclass
class Base:
    """A family's tiny model, shared by all its tests, and what it is like with nothing attached."""

    backbone: Backbone
    weights: dict[str, Tensor]
    plain: Tensor
    clean: Tensor

    @classmethod
    def of(cls, family: str) -> Base:
        backbone = plugins.families()[family].tiny()
        side, generator = backbone.resolution, torch.Generator().manual_seed(1)
        pixels = torch.rand(2, 3, side, side, generator=generator) * 2 - 1
        return cls(backbone, weights(backbone), answer(backbone), backbone.encode_images(pixels))

    def untouched(self) -> bool:
        """Whether every weight, by the same names, is bit for bit what it was, and frozen."""
        now = weights(self.backbone)
        params = [p for part in self.backbone.modules().values() for p in part.parameters()]
        return (
            now.keys() == self.weights.keys()
            and all(torch.equal(now[name], tensor) for name, tensor in self.weights.items())
            and not any(param.requires_grad for param in params)
            and not self.backbone.placeholders
            and torch.equal(answer(self.backbone), self.plain)
        )


@dataclass
class Story:
    """One tuner's short life on a base: attached, trained for `STEPS` steps, looked at, detached."""

    specs: Specs
    started: Tensor
    losses: list[float]
    half: dict[str, Tensor]
    half_optimizer: dict[str, Any]
    first: dict[str, Tensor]
    last: dict[str, Tensor]
    untuned: Tensor
    tuned: Tensor
    at_zero: Tensor
    at_one: Tensor
    left_untouched: bool

    @classmethod
    def of(cls, base: Base, specs: Specs) -> Story:
        backbone = base.backbone
        attached = attach_all([build(spec) for spec in specs], backbone, seed=1)
        try:
            started, untuned, first = answer(backbone), answer(backbone, SPOKEN), attached.state()
            optimizer = optimizer_of(attached)
            losses = learn(base, attached, optimizer, 0, STEPS // 2)
            half, half_optimizer = attached.state(), copy.deepcopy(optimizer.state_dict())
            losses += learn(base, attached, optimizer, STEPS // 2, STEPS)
            tuned = answer(backbone, SPOKEN)
            last = attached.state()
            attached.scale(0)
            at_zero = answer(backbone)
            attached.scale(1)
            at_one = answer(backbone, SPOKEN)
        finally:
            attached.undo()
        return cls(
            specs=specs,
            started=started,
            losses=losses,
            half=half,
            half_optimizer=half_optimizer,
            first=first,
            last=last,
            untuned=untuned,
            tuned=tuned,
            at_zero=at_zero,
            at_one=at_one,
            left_untouched=base.untouched(),
        )


def weights(backbone: Backbone) -> dict[str, Tensor]:
    parts = backbone.modules().items()
    return {f"{part}.{name}": t.clone() for part, module in parts for name, t in module.state_dict().items()}


@torch.no_grad()
def answer(backbone: Backbone, prompts: tuple[str, ...] = PLAIN) -> Tensor:
    """The denoiser on fixed noise at two levels."""
    side = backbone.resolution // backbone.latent.factor
    shape = (2, backbone.latent.channels, side, side)
    noisy = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    rows = prompts * (2 // len(prompts))
    return backbone.predict(noisy, backbone.noise.levels(2), backbone.encode_prompts(rows))


def optimizer_of(attached: Attached) -> torch.optim.Optimizer:
    """AdamW without decay, so that only gradients move anything; rates as the recipe gives them."""
    groups = [
        {"params": [param], "lr": attached.rate(name) or 1e-2} for name, param in attached.params.items()
    ]
    return torch.optim.AdamW(groups, weight_decay=0)


def learn(
    base: Base, attached: Attached, optimizer: torch.optim.Optimizer, begin: int, end: int
) -> list[float]:
    """Steps on one batch with fixed noise; the loss before each."""
    backbone, law = base.backbone, base.backbone.noise
    generator = torch.Generator().manual_seed(2)
    noise = torch.randn(base.clean.shape, generator=generator)
    t = law.levels(2)
    noisy, target = law.mix(base.clean, noise, t), law.target(base.clean, noise, t)
    losses = []
    attached.train()
    for _ in range(begin, end):
        optimizer.zero_grad()
        guess = backbone.predict(noisy, t, backbone.encode_prompts([f"a {WORD} cat", f"x {WORD}"]))
        loss = (guess - target).square().mean()
        loss.backward()
        optimizer.step()
        attached.after_step()
        losses.append(float(loss.detach()))
    attached.train(False)
    return losses


def card(backbone: Backbone, specs: Specs) -> AdapterCard:
    """What an adapter of this training says of itself."""
    return AdapterCard(
        recipe=Recipe(tuners=specs),
        family=backbone.family,
        base_sha256=backbone.sha256,
        dataset="0" * 64,
        livery_version="0",
        step=STEPS,
    )
