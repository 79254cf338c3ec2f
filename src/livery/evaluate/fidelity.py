"""Does it look like the house? Style recognised, likeness to the designers' own, nearness to the style."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import normalize


def style_recognised(images: Tensor, labels: Tensor, wanted: int) -> Tensor:
    """1 where the judge's best style label is the wanted one, else 0.

    images [N, D] and labels [S, D] of length 1; wanted: row number into labels -> float32 [N].
    """
    return ((images @ labels.T).argmax(1) == wanted).float()


def likeness(images: Tensor, originals: Tensor) -> Tensor:
    """Cosine of each picture with the designers' picture of the same thing: [N, D], [N, D] -> [N].

    The CLIP-I of Ruiz et al. 2023 (DreamBooth, arXiv:2208.12242, section 4.1), picture by picture.
    """
    return (images * originals).sum(1)


def likeness_of_others(originals: Tensor) -> Tensor:
    """The yardstick for `likeness`: mean cosine of each original with all other originals: [N, D] -> [N]."""
    count = len(originals)
    similarity = originals @ originals.T
    return (similarity.sum(1) - similarity.diagonal()) / max(count - 1, 1)


def style_centre(references: Tensor) -> Tensor:
    """The direction of the mean of pictures in the wanted style: [R, D] -> [D], length 1."""
    return normalize(references.mean(0), dim=0)


def nearness(images: Tensor, centre: Tensor) -> Tensor:
    """Cosine with the centre of the style: [N, D], [D] -> [N]."""
    return images @ centre
