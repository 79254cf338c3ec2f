"""Does it copy? The nearest training picture, and how near two different pictures of the brand are anyway.

A bare threshold on embeddings says little (Carlini et al. 2023, arXiv:2301.13188, section 4), so the
yardstick is the brand itself: the designers' held-out pictures against the same training pictures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image, ImageOps
from torch import Tensor

from livery.evaluate.embedder import Embedder

NULL_QUANTILE = 0.99


@dataclass(frozen=True)
class Shelf:
    """The training pictures as the judge sees them, each also mirrored.

    vectors [2T, D]: first the T pictures, then their mirror images.
    """

    sha256s: tuple[str, ...]
    vectors: Tensor

    @classmethod
    def of(cls, embedder: Embedder, sha256s: Sequence[str], images: Sequence[Image.Image]) -> Shelf:
        mirrored = [ImageOps.mirror(image) for image in images]
        return cls(tuple(sha256s), embedder.embed_images([*images, *mirrored]))

    def nearest(self, images: Tensor) -> Nearest:
        """images [N, D] -> the nearest training picture of each."""
        similarity, row = (images @ self.vectors.T).max(1)
        count = len(self.sha256s)
        return Nearest(similarity, [self.sha256s[r % count] for r in row.tolist()], row >= count)


@dataclass(frozen=True)
class Nearest:
    """similarity [N] (cosine), the training picture of each, and whether its mirror image was nearer [N]."""

    similarity: Tensor
    sha256s: list[str]
    mirrored: Tensor


def too_near(similarity: Tensor, null: Tensor) -> Tensor:
    """1 where a picture lies nearer to training than 99% of the brand's other pictures do, else 0.

    similarity [N]; null [R]: nearest similarities of pictures that cannot be copies -> float32 [N].
    """
    return (similarity > torch.quantile(null, NULL_QUANTILE)).float()
