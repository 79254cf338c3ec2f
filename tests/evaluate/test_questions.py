"""Concept, style, likeness and copying on vectors whose answers can be seen by eye."""

import pytest
import torch

from livery.evaluate import copying, fidelity, prompt
from livery.nouns import LiveryError
from tests.evaluate.fakes import CONCEPTS, FakeEmbedder, flat

JUDGE = FakeEmbedder()
LABELS = JUDGE.embed_texts([f"a thing {n}" for n in range(CONCEPTS)])


def test_the_rank_counts_only_labels_that_are_better():
    images = torch.tensor([[1.0, 0, 0], [0, 1.0, 0]])
    labels = torch.tensor([[1.0, 0, 0], [0, 1.0, 0], [0, 1.0, 0], [0, 0, 1.0]])  # two with one text
    assert prompt.concept_ranks(images, labels, [0, 2]).tolist() == [1, 1]
    assert prompt.concept_ranks(images, labels, [3, 0]).tolist() == [2, 3]


def test_a_concept_is_found_among_the_first_five_and_not_at_the_sixth_place():
    image = torch.tensor([[0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3]])
    labels = torch.eye(7)
    found = [prompt.concept_found(image, labels, [place]).item() for place in range(7)]
    assert found == [1, 1, 1, 1, 1, 0, 0]


def test_the_judge_finds_what_was_drawn():
    images = JUDGE.embed_images([flat(3, 0), flat(4, 1)])
    assert prompt.concept_found(images, LABELS, [3, 3], top=1).tolist() == [1, 0]


def test_an_unknown_concept_is_named():
    with pytest.raises(LiveryError, match="'unicorn' is not among"):
        prompt.label_numbers(["unicorn"], ["cat"])


def test_style_is_recognised_by_its_label():
    styles = JUDGE.embed_texts([f"look {n} style" for n in range(3)])
    images = JUDGE.embed_images([flat(0, 2), flat(0, 1)])
    assert fidelity.style_recognised(images, styles, 2).tolist() == [1, 0]


def test_likeness_is_one_to_itself_half_to_the_same_style_and_nothing_to_a_stranger():
    images = JUDGE.embed_images([flat(3, 2), flat(4, 2), flat(4, 1)])
    originals = JUDGE.embed_images([flat(3, 2)] * 3)
    assert fidelity.likeness(images, originals).tolist() == pytest.approx([1, 0.5, 0])


def test_the_yardstick_leaves_each_original_out_of_its_own_mean():
    originals = JUDGE.embed_images([flat(n, 2) for n in range(4)])
    assert fidelity.likeness_of_others(originals).tolist() == pytest.approx([0.5] * 4)


def test_the_centre_is_nearer_to_its_own_style():
    centre = fidelity.style_centre(JUDGE.embed_images([flat(n, 2) for n in range(6)]))
    assert centre.norm().item() == pytest.approx(1)
    own, other = fidelity.nearness(JUDGE.embed_images([flat(9, 2), flat(9, 1)]), centre).tolist()
    assert own > 0.6
    assert other == pytest.approx(0)


class HalfAndHalf(FakeEmbedder):
    """Sees the left half of a picture only, so that mirroring matters."""

    def embed_images(self, images):
        return super().embed_images([image.crop((0, 0, 4, 8)) for image in images])


def test_the_nearest_training_picture_is_found_even_when_mirrored():
    two = flat(1, 0)
    two.paste((2, 0, 0), (4, 0, 8, 8))  # concept 1 left, 2 right
    shelf = copying.Shelf.of(HalfAndHalf(), ["a" * 64, "b" * 64], [two, flat(5, 1)])
    near = shelf.nearest(HalfAndHalf().embed_images([flat(2, 0), flat(5, 1), flat(1, 0)]))
    assert near.sha256s == ["a" * 64, "b" * 64, "a" * 64]
    assert near.mirrored.tolist() == [True, False, False]
    assert near.similarity.tolist() == pytest.approx([1, 1, 1])


def test_only_what_is_nearer_than_the_brand_is_to_itself_is_too_near():
    null = torch.linspace(0.5, 0.8, 101)  # its 99% quantile is 0.797
    assert copying.too_near(torch.tensor([0.79, 0.799, 0.95]), null).tolist() == [0, 1, 1]
