"""Nothing in the layer waits for a device or depends on what the data say, found without one.

Fake tensors have shapes and no data: reading a number on the host, or a shape that follows from
data, raises. What they let through, a copy between devices, a mode of our own catches.
"""

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import ecomoe
from ecomoe import EcoMoE
from ecomoe.relay import LossRelay

KINDS = {
    "plain": {},
    "gated": {"gated": True, "bias": False, "router": "linear", "top_k": 1},
    "warm-up and dropout": {"warmup_fraction": 0.1, "dropout": 0.1, "output_dropout": 0.1},
    "every loss": {
        "oracle_weight": 0.5,
        "ortho_weight": 0.1,
        "divergence_weight": 0.1,
        "z_weight": 0.1,
    },
    "heads": {"d_hidden": None, "num_classes": 3, "oracle_weight": 0.5},
    "off 16 bytes": {"d_model": 7, "d_hidden": 5},
}


class Waits(AssertionError):
    pass


class NoWaiting(TorchDispatchMode):
    """Fails where the host waits for a device: a number is read, or a tensor changes devices."""

    WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "bincount", "equal")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().split("::")[1].split(".")[0]
        if any(name.startswith(waiting) for waiting in self.WAITING):
            raise Waits(f"{func.name()} reads data on the host")
        result = func(*args, **(kwargs or {}))
        if name in ("_to_copy", "copy_", "lift_fresh_copy"):
            source = args[1] if name == "copy_" else args[0]
            if result.device != source.device:
                raise Waits(f"{func.name()} goes from {source.device} to {result.device}")
        return result


def build(kind, *, device, **keywords):
    arguments = {"d_model": 8, "d_hidden": 8, "tiers": (2, 2), "device": device}
    return EcoMoE(**{**arguments, **KINDS[kind], **keywords})


def call(layer, device, dtype=None):
    x = torch.randn(3, 5, layer.d_model, device=device, dtype=dtype, requires_grad=True)
    if layer.oracle == "competence":
        return layer(x, targets=torch.zeros(3, 5, device=device, dtype=torch.int64))
    return layer(x)


class TestForward:
    @pytest.mark.parametrize("kind", sorted(KINDS))
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("training", [False, True])
    def test_on_a_device(self, kind, dtype, training):
        with FakeTensorMode():
            layer = build(kind, device="cuda", dtype=dtype).train(training)
            with NoWaiting():
                y = call(layer, "cuda", dtype)
                auxiliary = ecomoe.aux_loss(layer)
        assert y.device.type == auxiliary.device.type == "cuda"
        assert y.shape == (3, 5, 3 if kind == "heads" else layer.d_model)
        assert y.dtype == dtype
        assert auxiliary.requires_grad == training

    def test_the_schedule_and_a_relay(self):
        with FakeTensorMode():
            layer = build("warm-up and dropout", device="cuda")
            relay = LossRelay(layer)
            relay.watch(layer)
            with NoWaiting():
                layer.set_progress(0.5)
                call(layer, "cuda")
            assert relay.num_attached == 0
            assert layer.auxiliary.cell.device.type == "cuda"

    def test_loading_an_operator_for_grouped_products(self):
        # The operator's own code, which fake tensors do not look into, in the dtype that they know.
        grouped = torch.ops.ecomoe.grouped_linear.default
        backward = torch.ops.ecomoe.grouped_linear_backward.default
        for width in (8, 7):
            with FakeTensorMode(), NoWaiting():
                new = {"device": "cuda", "dtype": torch.bfloat16}
                x_SD, weight_EFD = torch.randn(6, width, **new), torch.randn(3, width, width, **new)
                bias_EF = torch.randn(3, width, **new)
                ends_E = torch.zeros(3, device="cuda", dtype=torch.int32)
                y_SF = implementation(grouped)(x_SD, weight_EFD, bias_EF, ends_E)
                gradients = implementation(backward)(y_SF, x_SD, weight_EFD, ends_E, True)
            assert y_SF.shape == (6, width)
            for gradient, operand in zip(gradients, (x_SD, weight_EFD, bias_EF), strict=True):
                assert gradient.shape == operand.shape


def implementation(operator):
    """Return what an operator of ours runs on real tensors."""
    from ecomoe import grouped as dispatch

    return getattr(dispatch, f"_{operator.name().split('::')[1].split('.')[0]}")._init_fn


class TestBackward:
    @pytest.mark.parametrize("kind", sorted(KINDS))
    @pytest.mark.parametrize("way", ["explicit", "relay"])
    def test_without_data(self, kind, way):
        with FakeTensorMode():
            layer = build(kind, device="cpu")
            relay = LossRelay(layer) if way == "relay" else None
            with NoWaiting():
                loss = call(layer, "cpu").square().sum()
                if relay is None:
                    loss = loss + ecomoe.aux_loss(layer)
                else:
                    relay.attach(loss)
                loss.backward()
        for name, parameter in layer.named_parameters():
            assert parameter.grad.shape == parameter.shape, name


class TestTheTestsThemselves:
    """That what they look for is found."""

    @pytest.mark.parametrize(
        "wait",
        [
            lambda x: x.cpu(),
            lambda x: x.to("cpu"),
            lambda x: x.new_tensor([1.0, 2.0]),
            lambda x: torch.zeros(2).copy_(x[:2]),
            lambda x: torch.equal(x, x),
        ],
    )
    def test_a_copy_is_noticed(self, wait):
        with FakeTensorMode():
            x = torch.randn(4, device="cuda")
            with NoWaiting(), pytest.raises((Waits, RuntimeError)):
                wait(x)

    @pytest.mark.parametrize(
        "wait",
        [
            lambda x: x.sum().item(),
            lambda x: x.tolist(),
            lambda x: x[x > 0],
            lambda x: x.nonzero(),
            lambda x: bool(x.any()),
        ],
    )
    def test_a_reading_is_noticed(self, wait):
        with FakeTensorMode():
            x = torch.randn(4, device="cuda")
            with NoWaiting(), pytest.raises((Waits, DataDependentOutputException, RuntimeError)):
                wait(x)
