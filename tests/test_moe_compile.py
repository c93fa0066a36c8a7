"""The compiled layer against the eager one, forward and backward, in one graph.

The fast tests capture the graphs of both passes and run them as they are; the slow ones have
Inductor write code for them, which takes half a minute each.
"""

import copy

import pytest
import torch
from tolerances import assert_near
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F

import ecomoe
from ecomoe import EcoMoE
from ecomoe.relay import LossRelay
from ecomoe.routers import HashRouter
from ecomoe.token_ids import feed_token_ids

MAX_GRAPHS = 3
TEMPERATURES = [3.0, 1.5, 0.7, 0.3]
EVERY_LOSS = {
    "oracle_weight": 0.5,
    "ortho_weight": 0.1,
    "divergence_weight": 0.1,
    "z_weight": 0.01,
    "strength": 1.0,
}
KINDS = {
    "plain": {},
    "every loss": EVERY_LOSS,
    "gated, top 1": {"gated": True, "bias": False, "top_k": 1, "router": "linear"},
    "off 16 bytes": {"d_model": 7, "d_hidden": 5},
    "cosine": {"router": "cosine", "router_options": {"d_space": 4}},
    "hash": {"router": "hash"},
    "random": {"router": "random", "top_k": 1},
}
BACKENDS = ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]
# Quickly what differs in the graph, slowly all there is.
TRAINED = [
    ("every loss", torch.float32, "aot_eager"),
    ("every loss", torch.bfloat16, "aot_eager"),
    ("gated, top 1", torch.float32, "aot_eager"),
    ("off 16 bytes", torch.bfloat16, "aot_eager"),
    ("cosine", torch.float32, "aot_eager"),
    ("cosine", torch.float64, "aot_eager"),
    ("hash", torch.float32, "aot_eager"),
    ("random", torch.bfloat16, "aot_eager"),
    *(
        pytest.param(kind, dtype, "inductor", marks=pytest.mark.slow)
        for kind in KINDS
        for dtype in (torch.float32, torch.float64, torch.bfloat16)
    ),
]
# Inductor looks for a way to write its C++ that setuptools has deprecated, and the like.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def step(forward, layer, x, *, relay=None):
    """Return outputs and gradients of one training step."""
    layer.zero_grad()
    x = x.clone().requires_grad_()
    y = forward(x)
    loss = y.float().square().sum()
    if relay is None:
        loss = loss + ecomoe.aux_loss(layer)
    else:
        relay.attach(loss)
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in layer.named_parameters()}
    return {"y": y.detach(), "x": x.grad, **gradients}


def assert_steps_agree(actual, expected, dtype):
    for name, tensor in expected.items():
        assert_near(actual[name], tensor, dtype, name=name)


def build(kind, dtype):
    torch.manual_seed(0)
    sizes = {"d_model": 8, "d_hidden": 8, "tiers": (2, 2)}
    # Of experts that are nearly alike the router's gradient is a small difference of large numbers.
    layer = EcoMoE(**sizes | KINDS[kind], spread=1.0, dtype=dtype)
    eager = copy.deepcopy(layer)
    for each in (layer, eager):
        if isinstance(each.router, HashRouter):
            each.router.tokens.ids = torch.arange(9) % 4
    return layer, eager


class TestLayer:
    @pytest.mark.parametrize(("kind", "dtype", "backend"), TRAINED)
    def test_training_at_changing_temperatures(self, kind, dtype, backend):
        layer, eager = build(kind, dtype)
        counter = CompileCounterWithBackend(backend)
        compiled = torch.compile(layer, fullgraph=True, backend=counter)
        for temperature in TEMPERATURES:
            x = torch.randn(9, layer.d_model).to(dtype)
            for each in (layer, eager):
                each.temperature.fill_(temperature)
            assert_steps_agree(step(compiled, layer, x), step(eager, eager, x), dtype)
        assert counter.frame_count <= MAX_GRAPHS

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_training_at_changing_sizes(self, dtype):
        layer, eager = build("plain", dtype)
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(layer, fullgraph=True, backend=counter)
        for num_tokens in (3, 9, 50, 300):
            x = torch.randn(num_tokens, layer.d_model).to(dtype)
            assert_steps_agree(step(compiled, layer, x), step(eager, eager, x), dtype)
        assert counter.frame_count <= MAX_GRAPHS

    def test_training_where_every_size_and_number_is_a_symbol(self):
        layer, eager = build("plain", torch.float32)
        counter = CompileCounterWithBackend("aot_eager")

        @torch.compile(fullgraph=True, dynamic=True, backend=counter)
        def compiled(x):
            return layer(x)

        for num_tokens in (3, 300):
            x = torch.randn(num_tokens, layer.d_model)
            assert_steps_agree(step(compiled, layer, x), step(eager, eager, x), torch.float32)
        assert counter.frame_count <= MAX_GRAPHS

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_evaluation_at_changing_temperatures_and_sizes(self, dtype):
        layer, eager = build("plain", dtype)
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(layer.eval(), fullgraph=True, backend=counter)
        for num_tokens, temperature in enumerate(TEMPERATURES, start=5):
            for each in (layer, eager):
                each.temperature.fill_(temperature)
            x = torch.randn(num_tokens, layer.d_model).to(dtype)
            with torch.no_grad():
                assert_near(compiled(x), eager.eval()(x), dtype)
        assert counter.frame_count <= MAX_GRAPHS

    def test_under_autocast(self):
        layer, eager = build("every loss", torch.float32)
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        x = torch.randn(9, 8)
        with torch.autocast("cpu", torch.bfloat16):
            actual, expected = step(compiled, layer, x), step(eager, eager, x)
        assert_steps_agree(actual, expected, torch.bfloat16)

    def test_warm_up_ends_without_another_graph(self):
        layer = EcoMoE(8, 8, tiers=(2, 2), warmup_fraction=0.5)
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(layer, fullgraph=True, backend=counter)
        x = torch.randn(40, 8)
        for progress, same in ((0.1, False), (0.6, True), (0.2, False)):
            layer.set_progress(progress)
            learned = layer.eval()(x)
            layer.train()
            y = compiled(x)
            ecomoe.aux_loss(layer)
            assert torch.allclose(y, learned, atol=1e-6) == same
        assert counter.frame_count <= MAX_GRAPHS

    # The compiler looks at the gradient of what earlier calls left, which is no leaf.
    @pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
    def test_accumulation_and_unread_losses(self):
        layer, eager = build("plain", torch.float32)
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(layer, fullgraph=True, backend=counter)
        parts = torch.randn(7, 9, 8)
        outputs = [forward(x) for forward in (compiled, eager) for x in parts]
        assert len(outputs) == 14  # whose graphs keep what is left beside them
        assert_near(ecomoe.aux_loss(layer), ecomoe.aux_loss(eager), torch.float32)
        assert counter.frame_count <= MAX_GRAPHS


class TestGraphs:
    """The first step's graph serves the later ones: what was read leaves nothing to guard."""

    @staticmethod
    def steps(layers, compiled, *, num_steps=3):
        for _ in range(num_steps):
            inputs = [torch.randn(9, layer.d_model) for layer in layers]
            outputs = [forward(x) for forward, x in zip(compiled, inputs, strict=True)]
            loss = sum(y.square().sum() for y in outputs) + ecomoe.aux_loss(nn.ModuleList(layers))
            loss.backward()

    @pytest.mark.parametrize("depth", [2, pytest.param(24, marks=pytest.mark.slow)])
    def test_a_model_of_many_layers_is_one_graph(self, depth):
        model = nn.Sequential(*(EcoMoE(8, 8, tiers=(4,)) for _ in range(depth)))
        model.d_model = 8
        counter = CompileCounterWithBackend("eager")
        self.steps([model], [torch.compile(model, fullgraph=True, backend=counter)])
        assert counter.frame_count == 1

    def test_24_layers_compiled_one_by_one_share_one(self):
        layers = [EcoMoE(8, 8, tiers=(4,)) for _ in range(24)]
        counter = CompileCounterWithBackend("eager")
        self.steps(layers, [torch.compile(m, fullgraph=True, backend=counter) for m in layers])
        assert counter.frame_count == 1

    @torch._dynamo.config.patch(recompile_limit=8)  # some libraries raise it for the process
    def test_shapes_have_one_each_up_to_the_compilers_limit(self):
        layers = [EcoMoE(width, 8, tiers=(4,)) for width in range(8, 16)]
        counter = CompileCounterWithBackend("eager")
        self.steps(layers, [torch.compile(m, fullgraph=True, backend=counter) for m in layers])
        assert counter.frame_count == len(layers)

    def test_a_step_that_reads_the_loss_within_the_graph(self):
        layer, eager = build("plain", torch.float32)
        counter = CompileCounterWithBackend("eager")

        @torch.compile(fullgraph=True, backend=counter)
        def loss_of(x):
            return layer(x).square().sum() + ecomoe.aux_loss(layer)

        for x in torch.randn(3, 9, 8):
            expected = eager(x).square().sum() + ecomoe.aux_loss(eager)
            assert_near(loss_of(x), expected, torch.float32)
        assert counter.frame_count == 1

    def test_a_loss_that_was_read_can_be_read_again(self):
        layer, eager = build("plain", torch.float32)
        compiled = torch.compile(layer, fullgraph=True, backend="eager")
        for x in torch.randn(3, 9, 8):
            compiled(x), eager(x)
            first, again = ecomoe.aux_loss(layer), ecomoe.aux_loss(layer)
            assert_near(first, ecomoe.aux_loss(eager), torch.float32)
            assert torch.equal(first, again)
            again.backward()


class Tagger(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.moe = EcoMoE(8, 8, tiers=(2, 2), router="hash")

    def forward(self, ids):
        return self.moe(self.embed(ids))


def test_token_ids_reach_a_hash_router_within_one_graph():
    model = Tagger().eval()
    feed_token_ids(model, model.embed)
    eager = copy.deepcopy(model)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for length in (5, 6, 7):
        ids = torch.randint(20, (2, length))
        assert_near(compiled(ids), eager(ids), torch.float32)
    assert counter.frame_count <= MAX_GRAPHS


class TestRelay:
    @pytest.mark.parametrize("backend", BACKENDS)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_the_compiled_layer_delivers_the_same(self, dtype, backend):
        layer, eager = build("every loss", dtype)
        relay, eager_relay = LossRelay(layer), LossRelay(eager)
        counter = CompileCounterWithBackend(backend)
        compiled = torch.compile(layer, fullgraph=True, backend=counter)
        relay.watch(compiled)
        eager_relay.watch(eager)
        alone = copy.deepcopy(layer)
        for temperature in TEMPERATURES:
            for each in (layer, eager, alone):
                each.temperature.fill_(temperature)
            x = torch.randn(9, 8).to(dtype)
            actual = step(compiled, layer, x, relay=relay)
            assert_steps_agree(actual, step(eager, eager, x, relay=eager_relay), dtype)
            # And this is what the explicit way gives.
            assert_steps_agree(actual, step(alone, alone, x), dtype)
        assert counter.frame_count <= MAX_GRAPHS

    def test_inside_a_compiled_model_with_scaling_and_accumulation(self):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 8), EcoMoE(8, 8, tiers=(2, 2), **EVERY_LOSS))
        model.append(nn.Linear(8, 3))
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        relay = LossRelay(model)
        relay.watch(compiled)
        eager = copy.deepcopy(model)
        for seed in range(2):
            torch.manual_seed(seed)
            x, targets = torch.randn(9, 6), torch.randint(3, (9,))
            loss = F.cross_entropy(compiled(x), targets)
            relay.attach(loss)
            (loss * 1024 / 2).backward()
            loss = F.cross_entropy(eager(x), targets) + ecomoe.aux_loss(eager)
            (loss * 1024 / 2).backward()
        for (name, parameter), other in zip(
            model.named_parameters(), eager.parameters(), strict=True
        ):
            assert_near(parameter.grad, other.grad, torch.float32, name=name)
