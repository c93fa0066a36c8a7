"""Converted models with each router: training, copies, round trips, generation, token ids."""

import copy

import pytest
import torch
from torch import nn

import ecomoe
from ecomoe.routers import ROUTERS, HashRouter

transformers = pytest.importorskip("transformers")

from ecomoe.integrations.tiny import inputs_for, tiny_model  # noqa: E402


@pytest.fixture(autouse=True)
def _quiet():
    transformers.utils.logging.disable_progress_bar()


def converted(router="hash", model_type="gpt2", auto="AutoModelForCausalLM", **settings):
    torch.manual_seed(0)
    model = tiny_model(model_type, auto=auto)
    settings = {"tiers": (2, 2), "init": "noise", "verbose": False, **settings}
    return ecomoe.convert(model, router=router, **settings).eval()


def train(model, *, steps=8):
    """Return the loss of each step on one batch."""
    model.train()
    inputs = inputs_for(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(steps):
        task = model(**inputs, labels=inputs["input_ids"]).loss
        (task + ecomoe.aux_loss(model)).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(task.item())
    return losses


@pytest.mark.parametrize("router", ROUTERS)
class TestEveryRouter:
    def test_trains(self, router):
        losses = train(converted(router))
        assert losses[-1] < losses[0] - 0.05

    def test_comes_back_from_disk_and_from_a_copy(self, router, tmp_path):
        model = converted(router)
        inputs = inputs_for(model)
        want = model(**inputs).logits
        model.save_pretrained(tmp_path)
        for other in (copy.deepcopy(model), ecomoe.from_pretrained(tmp_path)):
            assert torch.equal(other(**inputs).logits, want)

    def test_generates_with_a_cache_as_without(self, router):
        model = converted(router)
        ids = inputs_for(model)["input_ids"][:, :4]
        settings = {
            "attention_mask": torch.ones_like(ids),
            "max_new_tokens": 6,
            "do_sample": False,
            "pad_token_id": 0,
        }
        cached = model.generate(ids, use_cache=True, **settings)
        assert torch.equal(model.generate(ids, use_cache=False, **settings), cached)


def test_a_frozen_router_costs_what_a_learned_one_does(capsys):
    flops = []
    for router in ("cosine", "random", "hash"):
        converted(router, verbose=True)
        line = capsys.readouterr().out.splitlines()[-1]
        assert line.startswith("  FLOPs a token")
        flops.append(line.split()[-2:])
    assert flops[0] == flops[1] != flops[2]


def test_options_are_kept(tmp_path):
    model = converted("cosine", router_options={"d_space": 3})
    model.save_pretrained(tmp_path)
    router = ecomoe.from_pretrained(tmp_path).transformer.h[1].mlp.router
    assert router.d_space == 3
    assert torch.equal(router.centroids, model.transformer.h[1].mlp.router.centroids)


class TestHash:
    def experts_of(self, model, ids):
        seen = []
        routers = [m for m in model.modules() if isinstance(m, HashRouter)]
        hooks = [r.register_forward_hook(lambda *h: seen.append(h[-1])) for r in routers]
        model(ids)
        for hook in hooks:
            hook.remove()
        return [routing.expert_ids_NK for routing in seen]

    def test_a_token_has_the_same_experts_wherever_it_stands(self):
        model = converted(tiers=(16,))
        ids = torch.tensor([[5, 7, 5], [9, 5, 7]])
        for experts_NK in self.experts_of(model, ids):
            assert torch.equal(experts_NK[0], experts_NK[2])
            assert torch.equal(experts_NK[0], experts_NK[4])
            assert torch.equal(experts_NK[1], experts_NK[5])
        first, second = self.experts_of(model, torch.arange(50).view(1, -1))
        assert not torch.equal(first, second)  # each layer hashes in its own way

    def test_encoder_and_decoder_have_their_own_ids(self):
        model = converted(model_type="t5", auto="AutoModelForSeq2SeqLM", tiers=(16,))
        inputs = inputs_for(model)
        decoder_ids = inputs["decoder_input_ids"]
        seen = []
        block = model.decoder.block[0].layer[-1].DenseReluDense
        block.router.register_forward_hook(lambda *h: seen.append(h[-1].expert_ids_NK))
        model(**inputs)
        other_text = inputs["input_ids"].roll(1, 1)
        model(input_ids=other_text, decoder_input_ids=decoder_ids)
        assert torch.equal(seen[0], seen[1])

    def test_embedded_inputs_are_refused(self):
        model = converted()
        inputs = inputs_for(model)
        model(**inputs)
        embedded = model.get_input_embeddings()(inputs["input_ids"])
        with pytest.raises(ValueError, match="this call has none"):
            model(inputs_embeds=embedded)

    def test_a_model_without_token_ids_is_refused_and_left_alone(self):
        model = tiny_model("vit")
        before = [type(module) for module in model.modules()]
        with pytest.raises(ValueError, match="ViTModel has no embedding of tokens; choose another"):
            ecomoe.convert(model, router="hash", verbose=False)
        assert [type(module) for module in model.modules()] == before

    def test_a_model_of_timm_is_refused(self):
        timm = pytest.importorskip("timm")
        model = timm.create_model("vit_tiny_patch16_224", depth=1)
        with pytest.raises(ValueError, match="has no embedding of tokens"):
            ecomoe.convert(model, router="hash", verbose=False)

    def test_a_model_inside_another(self):
        class Holder(nn.Module):
            def __init__(self):
                super().__init__()
                self.body = tiny_model("gpt2")

            def forward(self, ids):
                return self.body(ids)[0]

        model = ecomoe.convert(Holder(), router="hash", verbose=False)
        assert model(torch.arange(6).view(1, 6)).shape[:2] == (1, 6)

    def test_gradients_are_the_same_under_checkpointing(self):
        gradients = []
        for checkpointing in (False, True):
            model = converted(strength=0.0).train()
            if checkpointing:
                model.activation_checkpointing_enable()
            inputs = inputs_for(model)
            model(**inputs, labels=inputs["input_ids"]).loss.backward()
            gradients.append({name: p.grad for name, p in model.named_parameters()})
        for name, gradient in gradients[0].items():
            torch.testing.assert_close(gradients[1][name], gradient)
