"""Is it what was asked for? The judge must find the concept among its best k of all labels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from livery.nouns import LiveryError

TOP = 5


def concept_ranks(images: Tensor, labels: Tensor, asked: Sequence[int]) -> Tensor:
    """Rank of the asked label by image-text similarity, 1 = best.

    images [N, D] and labels [M, D] of length 1; asked: N row numbers into labels -> int64 [N].
    Labels with equal texts share the better rank.
    """
    similarity = images @ labels.T  # [N, M]
    own = similarity.gather(1, torch.tensor(asked)[:, None])  # [N, 1]
    return (similarity > own).sum(1) + 1


def concept_found(images: Tensor, labels: Tensor, asked: Sequence[int], top: int = TOP) -> Tensor:
    """1 where the asked label is among the best `top`, else 0 -> float32 [N]."""
    return (concept_ranks(images, labels, asked) <= top).float()


def label_numbers(asked: Sequence[str], concepts: Sequence[str]) -> list[int]:
    """The place of each asked concept in the list of labels. Raises LiveryError for an unknown one."""
    place = {concept: number for number, concept in enumerate(concepts)}
    for concept in asked:
        if concept not in place:
            raise LiveryError(f"concept '{concept}' is not among the suite's concepts; add it there.")
    return [place[concept] for concept in asked]
