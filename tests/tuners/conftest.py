"""One trained-like adapter for the tests of adapter files."""

from collections.abc import Callable

import pytest

from livery.nouns import AdapterCard, LowRankSpec, Recipe


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
