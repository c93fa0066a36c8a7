"""Hops and experts of different seeds: measures against plain loops and known cases."""

import pytest
import torch
from torch.nn import functional as F

from ecomoe.ecology.alignment import (
    collinearity,
    displacement,
    hop_diversity,
    pareto_front,
    vocabulary_alignment,
    weight_alignment,
)


class TestHops:
    def test_cosines_of_all_pairs(self):
        updates = torch.randn(3, 20, 5)
        cosine_HH = collinearity(updates)
        for i in range(3):
            for j in range(3):
                expected = F.cosine_similarity(updates[i], updates[j], dim=-1).mean().double()
                torch.testing.assert_close(cosine_HH[i, j], expected, rtol=1e-5, atol=1e-6)

    def test_longer_is_collinear_and_turned_is_not(self):
        first = torch.tensor([[1.0, 0.0]])
        turned = torch.tensor([[0.0, 3.0]])
        assert collinearity(torch.stack([first, 5 * first]))[0, 1] == pytest.approx(1.0)
        assert collinearity(torch.stack([first, turned]))[0, 1] == pytest.approx(0.0)

    def test_diversity_is_one_minus_jaccard(self):
        ids = torch.tensor([[[0, 1], [2, 3]], [[1, 0], [3, 4]]])
        # {0, 1} and {0, 1} share all; {2, 3} and {3, 4} one of three.
        assert hop_diversity(ids) == pytest.approx(1 - (1 + 1 / 3) / 2)
        assert hop_diversity(torch.tensor([[[0]], [[1]], [[2]]])) == 1.0
        with pytest.raises(ValueError, match="has one hop"):
            hop_diversity(ids[:1])

    def test_displacement_is_from_first_to_last_over_the_first(self):
        positions = torch.tensor([[[2.0, 0.0]], [[9.0, 9.0]], [[2.0, 1.0]]])
        assert displacement(positions) == pytest.approx(0.5)


class TestSeeds:
    def test_the_same_words_in_another_order_are_found(self):
        words_VD = torch.randn(200, 16)
        first_ED = torch.randn(12, 16)
        order = torch.randperm(12)
        turn, _ = torch.linalg.qr(torch.randn(16, 16))
        # Another basis: the same roles by other weights.
        found = vocabulary_alignment(
            first_ED, first_ED[order] @ turn, first_VD=words_VD, second_VD=words_VD @ turn, top=10
        )
        assert found.mean == pytest.approx(1.0)
        assert torch.equal(order[found.partner_E], torch.arange(12))
        assert found.chance < 0.2
        assert weight_alignment(first_ED, first_ED[order] @ turn).mean < 0.8

    def test_unrelated_experts_are_alike_by_chance_alone(self):
        sizes = {"first_VD": torch.randn(200, 16), "second_VD": torch.randn(200, 16), "top": 10}
        found = vocabulary_alignment(torch.randn(30, 16), torch.randn(30, 16), **sizes)
        assert found.mean == pytest.approx(found.chance, abs=0.03)
        weights = weight_alignment(torch.randn(30, 64), torch.randn(30, 64))
        assert weights.mean == pytest.approx(weights.chance, abs=0.05)

    def test_weights_are_matched_one_to_one(self):
        weights_ED = torch.randn(10, 32)
        order = torch.randperm(10)
        found = weight_alignment(weights_ED, 7.0 * weights_ED[order])
        assert found.mean == pytest.approx(1.0)
        assert torch.equal(order[found.partner_E], torch.arange(10))
        fewer = weight_alignment(weights_ED, weights_ED[:4])
        assert (fewer.partner_E >= 0).sum() == 4

    def test_what_does_not_fit_is_refused(self):
        experts = torch.randn(3, 4)
        with pytest.raises(ValueError, match="vocabularies have 9 and 8 ids"):
            vocabulary_alignment(
                experts, experts, first_VD=torch.randn(9, 4), second_VD=torch.randn(8, 4)
            )
        with pytest.raises(ValueError, match="top=20 must be from 1 to the vocabulary's 9 ids"):
            vocabulary_alignment(
                experts, experts, first_VD=torch.randn(9, 4), second_VD=torch.randn(9, 4)
            )


def test_the_front_leaves_out_what_is_beaten():
    points = [(3.0, 1.0), (1.0, 3.0), (2.0, 3.5), (2.5, 1.0), (4.0, 0.5)]
    assert pareto_front(points) == [(1.0, 3.0), (2.5, 1.0), (4.0, 0.5)]
    assert pareto_front([]) == []
