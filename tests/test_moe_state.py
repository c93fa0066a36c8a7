"""What a layer is beside its forward pass: parameters, dtypes, copies, randomness, transforms."""

import copy
import io

import pytest
import torch
from reference import LoopMoE
from tolerances import assert_near
from torch import nn
from torch.func import functional_call, grad, vmap

import ecomoe
from ecomoe import EcoMoE

EVERY_LOSS = {"divergence_weight": 0.3, "z_weight": 0.02, "ortho_weight": 0.4, "strength": 1.0}
KINDS = [
    {},
    {"gated": True, "bias": False, "router": "linear"},
    {"ortho_weight": 0.1, "warmup_fraction": 0.1},
    {"hidden_norm": nn.LayerNorm(5), "d_output": 3},
    {"router": "cosine", "router_options": {"d_space": 3}},
    {"router": "random"},
]


def states(layer):
    return {name: value.clone() for name, value in layer.state_dict().items()}


def assert_bit_equal(actual, expected):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


class TestStateDict:
    @pytest.mark.parametrize("kind", KINDS)
    def test_strict_round_trip(self, kind):
        layer = EcoMoE(6, 5, tiers=(3, 1), **kind)
        layer.set_progress(0.2)
        layer(torch.randn(4, 6)).sum().backward()
        file = io.BytesIO()
        torch.save(layer.state_dict(), file)
        file.seek(0)
        other = EcoMoE(6, 5, tiers=(3, 1), **copy.deepcopy(kind))
        other.load_state_dict(torch.load(file, weights_only=True), strict=True)
        assert_bit_equal(other.state_dict(), layer.state_dict())
        assert other.temperature == layer.temperature != other.control.temperature
        x = torch.randn(4, 6)
        assert torch.equal(other.eval()(x), layer.eval()(x))

    def test_holds_no_statistics(self):
        layer = EcoMoE(6, 5, tiers=(3, 1))
        before = states(layer)
        layer(torch.randn(4, 6)).sum().backward()
        assert_bit_equal(layer.state_dict(), before)
        parameters = dict(layer.named_parameters()).keys()
        assert before.keys() - parameters == {"temperature"}


class TestDtypes:
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
    @pytest.mark.parametrize("how", ["argument", "cast"])
    def test_output_as_the_input_and_the_router_at_least_fp32(self, dtype, how):
        if how == "argument":
            layer = EcoMoE(6, 5, tiers=(3, 1), ortho_weight=0.1, dtype=dtype)
        else:
            layer = EcoMoE(6, 5, tiers=(3, 1), ortho_weight=0.1).to(dtype)
        wide = torch.promote_types(dtype, torch.float32)
        assert {p.dtype for p in layer.experts.parameters()} == {dtype}
        assert {p.dtype for p in layer.router.parameters()} == {wide}
        assert layer.prototypes.dtype == wide
        x = torch.randn(4, 6, dtype=dtype, requires_grad=True)
        y = layer(x)
        assert y.dtype == dtype
        (y.float().sum() + ecomoe.aux_loss(layer)).backward()
        for name, tensor in [("x", x), *layer.named_parameters()]:
            assert tensor.grad.dtype == tensor.dtype, name
            assert tensor.grad.isfinite().all(), name

    @pytest.mark.parametrize("narrow", [nn.Module.half, nn.Module.bfloat16])
    def test_narrowing_a_whole_model_spares_router_temperature_and_prototypes(self, narrow):
        model = nn.Sequential(nn.Linear(6, 6), EcoMoE(6, 5, tiers=(3, 1), ortho_weight=0.1))
        before = states(model)
        narrow(model)
        for name, value in model.state_dict().items():
            wide = any(part in name for part in ("router", "prototypes", "temperature"))
            assert (value.dtype == torch.float32) == wide, name
            if wide:
                assert torch.equal(value, before[name]), name

    def test_the_default_dtype(self):
        torch.set_default_dtype(torch.bfloat16)
        try:
            layer = EcoMoE(6, 5, tiers=(3, 1))
        finally:
            torch.set_default_dtype(torch.float32)
        assert {p.dtype for p in layer.router.parameters()} == {torch.float32}
        assert {p.dtype for p in layer.experts.parameters()} == {torch.bfloat16}

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_autocast(self, dtype):
        layer = EcoMoE(6, 5, tiers=(3, 1), **EVERY_LOSS)
        decisions = []
        layer.router.register_forward_hook(lambda *hooked: decisions.append(hooked[-1]))
        x = torch.randn(9, 6).to(dtype).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
        auxiliary = ecomoe.aux_loss(layer)
        assert y.dtype == dtype
        assert decisions[0].logits_NE.dtype == decisions[0].weights_NK.dtype == torch.float32
        reference = LoopMoE(layer)
        outcome = reference(x.detach().double())
        assert_near(y, outcome.output, torch.bfloat16)
        # The losses of the router alone have nothing to do with the experts' precision.
        for name in ("balance", "entropy", "ortho", "prototype", "z"):
            # The entropy loss is a small difference from log E.
            term = layer.auxiliary.terms[name]
            assert_near(term, outcome.terms[name], torch.float32, name=name, scale=1.0)
        assert_near(
            layer.auxiliary.terms["divergence"], outcome.terms["divergence"], torch.bfloat16
        )
        (y.float().sum() + auxiliary).backward()
        (outcome.output.sum() + outcome.auxiliary).backward()
        for name, parameter in layer.named_parameters():
            assert_near(parameter.grad, reference.parameters[name].grad, torch.bfloat16, name=name)

    def test_autocast_with_a_prototype_teacher(self):
        layer = EcoMoE(6, 5, tiers=(3, 1), oracle_weight=0.5)
        x = torch.randn(9, 6)
        with torch.autocast("cpu", torch.bfloat16):
            layer(x)
        expected = LoopMoE(layer)(x.double()).terms["oracle"]
        assert_near(layer.auxiliary.terms["oracle"], expected, torch.float32)


class TestMeta:
    @pytest.mark.parametrize("kind", KINDS)
    def test_meta_then_empty_then_reset(self, kind):
        keywords = {"tiers": (3, 1), "temperature": 2.0, "spread": 1.0, **copy.deepcopy(kind)}
        with torch.device("meta"):
            layer = EcoMoE(6, 5, **keywords)
        if layer.experts.norm is not None:
            layer.experts.norm.to("meta")
        assert all(tensor.is_meta for tensor in layer.state_dict().values())
        layer.to_empty(device="cpu")
        with torch.no_grad():
            for tensor in layer.state_dict().values():
                tensor.fill_(True if tensor.dtype == torch.bool else torch.nan)
        layer.reset_parameters()
        if layer.experts.norm is not None:  # the caller's
            layer.experts.norm.reset_parameters()
        assert layer.temperature == 2.0
        if layer.random_routing is not None:
            assert layer.random_routing
        torch.manual_seed(3)
        fresh = EcoMoE(6, 5, **keywords)
        for name, value in fresh.state_dict().items():
            drawn = layer.state_dict()[name]
            assert drawn.isfinite().all(), name
            if value.numel() > 4:
                torch.testing.assert_close(
                    drawn.float().std(), value.float().std(), rtol=0.6, atol=0
                )

    def test_the_device_argument(self):
        layer = EcoMoE(6, 5, tiers=(3, 1), ortho_weight=0.1, warmup_fraction=0.1, device="meta")
        assert all(tensor.is_meta for tensor in layer.state_dict().values())
        assert layer(torch.empty(4, 6, device="meta")).shape == (4, 6)


class TestRandomness:
    def run(self, layer, x):
        torch.manual_seed(5)
        y = layer(x)
        (y.sum() + ecomoe.aux_loss(layer)).backward()
        gradients = {name: p.grad for name, p in layer.named_parameters()}
        layer.zero_grad()
        return {"y": y.detach(), **gradients}

    def layer(self, **keywords):
        torch.manual_seed(0)
        settings = {"dropout": 0.2, "warmup_fraction": 0.5, **EVERY_LOSS, **keywords}
        return EcoMoE(6, 5, tiers=(3, 1), **settings)

    def test_the_same_seed_gives_the_same_bits(self):
        x = torch.randn(50, 6)
        layer = self.layer()
        assert_bit_equal(states(self.layer()), states(layer))
        assert_bit_equal(self.run(self.layer(), x), self.run(layer, x))

    def test_deterministic_algorithms(self):
        x = torch.randn(50, 6)
        expected = self.run(self.layer(), x)
        torch.use_deterministic_algorithms(True)
        try:
            assert_bit_equal(self.run(self.layer(), x), expected)
        finally:
            torch.use_deterministic_algorithms(False)

    def test_evaluation_draws_no_random_number(self):
        layer = self.layer().eval()
        x = torch.randn(50, 6)
        state = torch.get_rng_state()
        assert torch.equal(layer(x), layer(x))
        assert torch.equal(torch.get_rng_state(), state)

    def test_training_draws_none_unless_asked_to(self):
        layer = self.layer(dropout=0.0, warmup_fraction=0.0)
        x = torch.randn(50, 6)
        state = torch.get_rng_state()
        layer(x)
        assert torch.equal(torch.get_rng_state(), state)

    def test_warm_up_is_random_in_training_and_ends(self):
        layer = self.layer(dropout=0.0)
        x = torch.randn(50, 6)
        learned = layer.eval()(x)
        layer.train()
        assert not torch.equal(layer(x), learned)
        layer.set_progress(0.5)
        layer.temperature.fill_(layer.control.temperature)
        assert torch.equal(layer(x), learned)


class TestTransforms:
    def parts(self, **keywords):
        layer = EcoMoE(6, 5, tiers=(3, 1), dtype=torch.float64, **keywords)
        parameters = {name: p.detach() for name, p in layer.named_parameters()}
        return layer, parameters, torch.randn(3, 7, 6, dtype=torch.float64)

    def test_gradcheck(self):
        layer, _, x = self.parts()
        assert torch.autograd.gradcheck(layer.eval(), (x[0].clone().requires_grad_(),))

    def test_second_derivatives(self):
        layer, _, x = self.parts(activation="silu")
        assert torch.autograd.gradgradcheck(layer.eval(), (x[0, :2].clone().requires_grad_(),))

    @pytest.mark.parametrize("training", [False, True])
    def test_func_grad(self, training):
        layer, parameters, x = self.parts(**EVERY_LOSS)
        layer.train(training)

        def loss(parameters, x):
            task = functional_call(layer, parameters, (x,)).square().sum()
            return task + ecomoe.aux_loss(layer)

        gradients = grad(loss)(parameters, x[0])
        layer(x[0]).square().sum().add(ecomoe.aux_loss(layer)).backward()
        for name, parameter in layer.named_parameters():
            expected = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            assert_near(gradients[name], expected, torch.float64, name=name)

    # Torch's own remark on the batched bounds; once in a program.
    @pytest.mark.filterwarnings("ignore:torch.searchsorted")
    def test_gradients_of_each_sample_by_vmap(self):
        layer, parameters, x = self.parts()
        layer.eval()

        def loss(parameters, x):
            return functional_call(layer, parameters, (x,)).square().sum()

        gradients = vmap(grad(loss), (None, 0))(parameters, x)
        for index in range(3):
            for name, expected in grad(loss)(parameters, x[index]).items():
                assert_near(gradients[name][index], expected, torch.float64, name=name)

    @pytest.mark.filterwarnings("ignore:torch.searchsorted")
    def test_losses_left_unread_in_a_transform_do_no_harm_later(self):
        layer, parameters, x = self.parts(**EVERY_LOSS)

        def loss(parameters, x):
            return functional_call(layer, parameters, (x,)).square().sum()

        for transformed in (grad(loss), vmap(grad(loss), (None, 0)), lambda _, x: vmap(layer)(x)):
            transformed(parameters, x)
            layer(x)
            ecomoe.aux_loss(layer)
        assert ecomoe.aux_loss(layer).isfinite()

    def test_export_with_a_dynamic_batch(self):
        layer = EcoMoE(6, 5, tiers=(3, 1)).eval()
        batch = torch.export.Dim("batch")
        program = torch.export.export(layer, (torch.randn(4, 6),), dynamic_shapes=({0: batch},))
        for num_tokens in (2, 4, 9):
            x = torch.randn(num_tokens, 6)
            torch.testing.assert_close(program.module()(x), layer(x))

    @pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
    def test_script_is_refused(self):
        layer = EcoMoE(6, 5, tiers=(3, 1))
        for module in (layer, nn.Sequential(nn.Linear(6, 6), layer)):
            with pytest.raises(ValueError, match=r"EcoMoE cannot be .*torch\.jit\.script.*export"):
                torch.jit.script(module)
