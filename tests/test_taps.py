import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import ecomoe
from ecomoe.ecology.statistics import BASES
from ecomoe.hooks import ForwardHook

LAYER = {"tiers": (3, 2, 1), "top_k": 2}


class Block(nn.Module):
    """Two layers, the first one checkpointed on request, with padding as transformers gives it."""

    def __init__(self, reentrant=None):
        super().__init__()
        self.embed = nn.Linear(8, 8)
        self.a = ecomoe.EcoMoE(8, 16, **LAYER)
        self.b = ecomoe.EcoMoE(8, 16, **LAYER)
        self.reentrant = reentrant

    def forward(self, x, attention_mask=None, past_key_values=None):
        x = self.embed(x)
        if self.reentrant is None:
            return self.b(self.a(x))
        return self.b(checkpoint(self.a, x, use_reentrant=self.reentrant))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Block()


def hooks_of(model):
    return [
        hook
        for module in model.modules()
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    ]


def layers_of(monitor, phase):
    return monitor.report(phase).to_dict()["layers"]


def expected_counts(model, x):
    """What the routers choose, read without a tap."""
    counts = []
    with torch.no_grad():
        x = model.embed(x)
        for layer in (model.a, model.b):
            ids_NK = layer.router(x.reshape(-1, 8), layer.temperature).expert_ids_NK
            counts.append(
                {
                    "top1": ids_NK[:, 0].bincount(minlength=6).tolist(),
                    "topk": ids_NK.reshape(-1).bincount(minlength=6).tolist(),
                }
            )
            x = layer(x)
    return counts


def test_counts_are_the_routers(model):
    x = torch.randn(4, 5, 8)
    expected = expected_counts(model, x)
    with ecomoe.Monitor(model) as monitor:
        model(x)
        model(x)
        found = layers_of(monitor, "train")
    assert [layer["name"] for layer in found] == ["a", "b"]
    for layer, counts in zip(found, expected, strict=True):
        assert layer["num_tokens"] == 40
        for basis in BASES:
            assert layer["counts"][basis] == [2 * count for count in counts[basis]]


def test_training_evaluation_and_generation_are_apart(model):
    with ecomoe.Monitor(model) as monitor:
        model(torch.randn(3, 8))
        model.eval()
        model(torch.randn(5, 8))
        with torch.inference_mode():
            model(torch.randn(7, 8))
            model(torch.randn(2, 8), past_key_values="cache")
        model.train()
        model(torch.randn(3, 8))
        seen = {phase: layers_of(monitor, phase)[0]["num_tokens"] for phase in ("train", "eval")}
        assert seen == {"train": 6, "eval": 12}
        assert layers_of(monitor, "generate")[1]["num_tokens"] == 2


@pytest.mark.parametrize("positional", [True, False])
def test_padding_is_left_out(model, positional):
    x = torch.randn(2, 4, 8)
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]])
    real = x[mask.bool()]
    expected = expected_counts(model, real)
    with ecomoe.Monitor(model) as monitor:
        if positional:
            model(x, mask)
        else:
            model(x, attention_mask=mask)
        found = layers_of(monitor, "train")
    for layer, counts in zip(found, expected, strict=True):
        assert (layer["num_tokens"], layer["padding"]) == (4, 4)
        assert layer["counts"] == counts


def test_a_mask_ends_with_its_pass(model):
    with ecomoe.Monitor(model) as monitor:
        model(torch.randn(2, 4, 8), attention_mask=torch.zeros(2, 4))
        with pytest.raises(RuntimeError):
            model(torch.randn(2, 4, 9), attention_mask=torch.zeros(2, 4))
        model.a(torch.randn(2, 4, 8))
        found = layers_of(monitor, "train")
    assert [layer["num_tokens"] for layer in found] == [8]


@pytest.mark.filterwarnings("ignore:the auxiliary losses of an EcoMoE layer are lost:UserWarning")
@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputation_is_counted_once(reentrant):
    model = Block(reentrant=reentrant)
    with ecomoe.Monitor(model) as monitor:
        model(torch.randn(6, 8)).sum().backward()
        found = layers_of(monitor, "train")
    assert [layer["num_tokens"] for layer in found] == [6, 6]


def test_no_tokens_are_no_harm(model):
    with ecomoe.Monitor(model) as monitor:
        model(torch.randn(0, 8))
        model(torch.randn(2, 8))
        assert layers_of(monitor, "train")[0]["num_tokens"] == 2


def test_nan_token_is_told(model):
    x = torch.randn(4, 8)
    x[1] = torch.nan
    with ecomoe.Monitor(model) as monitor:
        model(x)
        layer = layers_of(monitor, "train")[0]
    assert (layer["num_tokens"], layer["nonfinite"]) == (4, 1)
    assert layer["token_entropy"] > 0


def test_bfloat16_under_autocast_is_counted_exactly(model):
    with ecomoe.Monitor(model) as monitor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model(torch.randn(3001, 8))
        layer = layers_of(monitor, "train")[0]
    assert sum(layer["counts"]["top1"]) == 3001
    assert sum(layer["gate"]) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_not_watched(model, copied):
    with ecomoe.Monitor(model) as monitor:
        model(torch.randn(2, 8))
        twin = copied(model)
        twin(torch.randn(2, 8))
        assert all(hook.action is None for hook in hooks_of(twin))
        assert layers_of(monitor, "train")[0]["num_tokens"] == 2
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(twin.get_parameter(name), parameter)


def test_an_exception_of_a_copy_is_its_own(model):
    with ecomoe.Monitor(model):
        model.register_forward_hook(lambda *_: None)
        twin = copy.deepcopy(model)
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            twin(torch.randn(2, 7))


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_no_hook_is_left(model, error):
    optimizer = torch.optim.SGD(model.parameters())
    try:
        with ecomoe.Monitor(model, optimizer=optimizer, total_steps=5):
            model(torch.randn(2, 8))
            assert any(isinstance(hook, ForwardHook) for hook in hooks_of(model))
            if error is not None:
                raise error
    except (RuntimeError, KeyboardInterrupt) as raised:
        assert type(raised) is error  # noqa: PT017
    assert not hooks_of(model)
    assert not optimizer._optimizer_step_post_hooks


def test_no_hook_is_left_where_attaching_fails(model):
    with pytest.raises(ValueError, match="total_steps=0"):
        ecomoe.Monitor(model, total_steps=0)
    assert not hooks_of(model)


# The compiler hides this warning of its own, which it cannot where warnings are errors.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_compiled_without_a_graph_break(model):
    torch.compiler.reset()
    x = torch.randn(12, 8)
    expected = expected_counts(model, x)
    with ecomoe.Monitor(model) as monitor:
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        compiled(x).sum().backward()
        model.eval()
        compiled(x)
        compiled(x)
        for phase, calls in (("train", 1), ("eval", 2)):
            for layer, counts in zip(layers_of(monitor, phase), expected, strict=True):
                for basis in BASES:
                    assert layer["counts"][basis] == [calls * n for n in counts[basis]]
        probed = [layer["redundancy"] for layer in layers_of(monitor, "eval")]
        compiled(x)
        again = layers_of(monitor, "eval")
        model(x)
        eager = [layer["redundancy"] for layer in layers_of(monitor, "eval")]
    for layer, before, plain in zip(again, probed, eager, strict=True):
        assert layer["redundancy"] == before
        for name, value in plain.items():
            assert before[name] == pytest.approx(value, rel=1e-4), name
        assert before["probes"] == 12
        assert layer["lockdown"]["saturation"] == 1


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_made_in_the_middle_of_an_evaluation_hold_nothing_of_it(model, copied):
    sizes = {name: value.shape for name, value in model.state_dict().items()}
    with ecomoe.Monitor(model) as monitor:
        model.eval()
        model(torch.randn(4, 8))
        assert all(tap.probe is not None for tap in monitor._watch.taps)
        twin = copied(model)
        twin(torch.randn(4, 8))
        assert layers_of(monitor, "eval")[0]["num_tokens"] == 4
    assert {name: value.shape for name, value in twin.state_dict().items()} == sizes
    assert not hooks_of(model)
