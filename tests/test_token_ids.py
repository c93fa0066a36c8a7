"""Token ids: the models that read them, and what is no id."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ecomoe import EcoMoE
from ecomoe.token_ids import feed_token_ids

IDS = torch.tensor([3, 1, 4, 1, 5, 9, 2])


class Tagger(nn.Module):
    """A model of one's own over token ids."""

    def __init__(self, **keywords):
        super().__init__()
        self.embed = nn.Embedding(20, 6)
        self.moe = EcoMoE(6, 5, tiers=(8,), router="hash", **keywords)
        self.other = EcoMoE(6, 5, tiers=(8,), router="hash", **keywords)

    def forward(self, ids=None, embedded=None):
        x = self.embed(ids) if embedded is None else embedded
        return self.other(self.moe(x))


class TestTokenIds:
    def test_they_come_from_the_embedding(self):
        model = Tagger()
        feed_token_ids(model, model.embed)
        assert model.moe.router.tokens is model.other.router.tokens
        y = model(IDS.view(1, 7))
        assert torch.equal(model(IDS.flip(0).view(1, 7)).flip(1), y)

    @pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
    def test_copies_read_their_own(self, copied):
        model = Tagger()
        feed_token_ids(model, model.embed)
        y = model(IDS)
        other = copied(model)
        assert other.moe.router.tokens is not model.moe.router.tokens
        assert other.moe.router.tokens.ids is None
        assert torch.equal(other(IDS), y)
        model(IDS[:3])
        assert other.moe.router.tokens.ids.shape == (7,)

    def test_those_of_another_batch_are_not_taken(self):
        model = Tagger()
        feed_token_ids(model, model.embed)
        model(IDS)
        with pytest.raises(ValueError, match="goes by token ids, and this call has none"):
            model(embedded=torch.randn(7, 6))

    def test_their_number_must_fit(self):
        model = Tagger()
        with pytest.raises(ValueError, match="this call has none"):
            model(IDS)
        model.moe.router.tokens.ids = IDS
        with pytest.raises(
            ValueError, match=r"got 7 token ids for 3 tokens.*name the embedding.*or choose another"
        ):
            model(embedded=torch.randn(3, 6))

    def test_what_is_no_embedding_of_tokens_is_told_by_what_it_receives(self):
        """A projection gets features: six numbers a token, of which none is an id."""
        model = Tagger()
        model.embed = nn.Linear(6, 6)
        feed_token_ids(model, model.embed)
        with pytest.raises(ValueError, match="must be integers; name the token embedding itself"):
            model(torch.randn(7, 6))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bool])
    def test_they_must_be_integers(self, dtype):
        model = Tagger()
        model.moe.router.tokens.ids = IDS.to(dtype)
        with pytest.raises(ValueError, match=f"of dtype {dtype}, which must be integers"):
            model(embedded=torch.randn(7, 6))

    def test_a_model_without_routers_or_embedding_is_refused(self):
        with pytest.raises(ValueError, match="holds no hash router"):
            feed_token_ids(nn.Linear(2, 2), nn.Embedding(2, 2))
        with pytest.raises(ValueError, match="embeddings are missing"):
            feed_token_ids(Tagger())
        with pytest.raises(ValueError, match="'model' must be"):
            feed_token_ids("model", nn.Embedding(2, 2))

    def test_a_refused_call_leaves_the_model_as_it_was(self):
        model = Tagger()
        feed_token_ids(model, model.embed)
        want = model(IDS)
        with pytest.raises(ValueError, match="'embed' must be"):
            feed_token_ids(model, "embed")
        torch.testing.assert_close(model(IDS), want)

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_recomputation_reads_the_same(self, reentrant):
        gradients = []
        for checkpointed in (False, True):
            torch.manual_seed(0)
            model = Tagger(strength=0.0)
            feed_token_ids(model, model.embed)
            if checkpointed:
                inner = model.moe.forward
                model.moe.forward = lambda x, inner=inner: checkpoint(
                    inner, x, use_reentrant=reentrant
                )
            model(IDS).square().sum().backward()
            gradients.append(model.moe.experts.up_proj.weight.grad)
        torch.testing.assert_close(gradients[0], gradients[1])
