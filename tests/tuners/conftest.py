"""A base to tune, and trained-like adapters for the tests of adapter files and formats."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from livery.models.backbone import Backbone
from livery.models.sd1 import SD1
from livery.nouns import AdapterCard, LowRankSpec, Recipe, TunerSpec
from livery.tuners.tuner import attach_all, build


@pytest.fixture(scope="module")
def original() -> SD1:
    return SD1.tiny()


@pytest.fixture
def tiny(original: SD1) -> SD1:
    """A base that a test may change."""
    return copy.deepcopy(original)


@pytest.fixture
def card_for() -> Callable[..., AdapterCard]:
    def make(base_sha256: str, family: str = "sd1", spec: LowRankSpec | None = None) -> AdapterCard:
        return AdapterCard(
            recipe=Recipe(base="tiny", tuners=(spec or LowRankSpec(rank=4),)),
            family=family,
            base_sha256=base_sha256,
            dataset="0" * 64,
            trigger_words=("acme style",),
            livery_version="0.1.0",
            step=3,
        )

    return make


@pytest.fixture
def card_of() -> Callable[..., AdapterCard]:
    """The card of an adapter for this base with these tuners."""

    def make(backbone: Backbone, *specs: TunerSpec) -> AdapterCard:
        return AdapterCard(
            recipe=Recipe(base="tiny", tuners=specs),
            family=backbone.family,
            base_sha256=backbone.sha256,
            dataset="0" * 64,
            trigger_words=("acme style",),
            licences=("CC0-1.0",),
            livery_version="0.1.0",
            step=3,
        )

    return make


@pytest.fixture
def learnt_by() -> Callable[..., dict[str, Tensor]]:
    """A state in which every tensor has moved, as training would leave it."""

    def learn(backbone: Backbone, *specs: TunerSpec, size: float = 0.05, seed: int = 4) -> dict[str, Tensor]:
        attached = attach_all([build(spec) for spec in specs], backbone)
        start = attached.state()
        attached.undo()
        generator = torch.Generator().manual_seed(seed)
        return {name: t + size * torch.randn(t.shape, generator=generator) for name, t in start.items()}

    return learn
