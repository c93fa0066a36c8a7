"""Converted models under what torch does to a program: compile, export, differentiate, script."""

import copy

import pytest
import torch
from matrix import (
    SETTINGS,
    TOLERANCE,
    covers,
    inputs_of,
    probe,
    relative_error,
    run,
    task_loss,
    without_dropout,
)
from test_moe_device import NoWaiting
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call, grad, vmap

import ecomoe

MAX_GRAPHS = 3


@pytest.fixture
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@covers("21", slow=True)
@pytest.mark.parametrize(
    ("backend", "dtype"),
    [("inductor", torch.float32), *(("aot_eager", dtype) for dtype in TOLERANCE)],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.usefixtures("_fresh_compiler")
def test_compiled_in_one_graph(dense, backend, dtype):
    """As Inductor writes it, and in every dtype as it is captured; batches of several sizes."""
    model = ecomoe.convert(dense, init="noise", **SETTINGS).to(dtype)
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    with torch.no_grad():
        for batch in (2, 3, 5, 7):
            inputs = inputs_of(model, batch=batch)
            got, want = run(compiled, inputs), run(model, inputs)
            assert relative_error(got.double(), want.double()) < TOLERANCE[dtype]
    assert counter.frame_count <= MAX_GRAPHS


@covers("21", slow=True)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.usefixtures("_fresh_compiler")
def test_compiled_training(dense):
    """One graph, the gradients of eager."""
    model = ecomoe.convert(dense, init="noise", **SETTINGS).train()
    without_dropout(model)
    eager = copy.deepcopy(model)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for batch in (2, 3, 5, 7):
        inputs = inputs_of(eager, batch=batch)
        for forward, layered in ((compiled, model), (eager, eager)):
            layered.zero_grad()
            (task_loss(forward, inputs) + ecomoe.aux_loss(layered)).backward()
        for (name, got), want in zip(model.named_parameters(), eager.parameters(), strict=True):
            if want.grad is not None:
                torch.testing.assert_close(got.grad, want.grad, rtol=1e-4, atol=1e-6, msg=name)
    assert counter.frame_count <= MAX_GRAPHS


@covers("22")
@pytest.mark.parametrize("training", [False, True])
def test_no_operation_depends_on_data(dense, inputs, training):
    """The layers, on a device that is not there: reading a number on the host would raise."""
    model = ecomoe.convert(dense, **SETTINGS)
    for layer, x_ND in probe(model, inputs):
        both = WithLoss(layer).train(training)
        # Forward as on a device; the backward pass of fake tensors knows the CPU alone.
        for device in ("cuda", "cpu"):
            with FakeTensorMode():
                state = {
                    name: empty_like(tensor, device)
                    for name, tensor in both.state_dict(keep_vars=True).items()
                }
                x = torch.empty(x_ND.shape, device=device)
                with NoWaiting():
                    y, auxiliary = functional_call(both, state, (x,))
                    if training and device == "cpu":
                        (y.sum() + auxiliary).backward()
            assert y.shape == x_ND.shape
            assert y.device.type == auxiliary.device.type == device
        for name, parameter in both.named_parameters():
            assert not training or state[name].grad.shape == parameter.shape


class WithLoss(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x), ecomoe.aux_loss(self.layer)


def empty_like(tensor, device):
    return torch.empty(
        tensor.shape, dtype=tensor.dtype, device=device, requires_grad=tensor.requires_grad
    )


def functional(model, inputs):
    """Return parameters and a loss of them."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    buffers = dict(model.named_buffers())

    def loss(parameters, inputs):
        output = functional_call(model, (parameters, buffers), (), inputs)
        return (output if isinstance(output, torch.Tensor) else output[0]).square().mean()

    return parameters, loss


@covers("24 func.grad")
def test_functional_gradient(dense, inputs):
    """`torch.func.grad` gives what autograd gives."""
    model = ecomoe.convert(dense, init="noise", **SETTINGS)
    parameters, loss = functional(model, inputs)
    got = grad(loss)(parameters, inputs)
    want = torch.autograd.grad(
        loss(parameters, inputs), list(parameters.values()), allow_unused=True
    )
    for gradient, expected in zip(got.values(), want, strict=True):
        torch.testing.assert_close(
            gradient, torch.zeros_like(gradient) if expected is None else expected
        )


# Torch's own remark on the batched bounds; once in a program.
@covers("24 vmap")
@pytest.mark.filterwarnings("ignore:torch.searchsorted")
def test_gradients_of_each_sample(dense, inputs):
    """`vmap(grad)` of a layer over samples is `grad` of each."""
    model = ecomoe.convert(dense, init="noise", **SETTINGS)
    for layer, x_ND in probe(model, inputs):
        x_BND = x_ND[: len(x_ND) // 2 * 2].unflatten(0, (2, -1))
        parameters = {name: p.detach() for name, p in layer.named_parameters()}

        def loss(parameters, x, layer=layer):
            return functional_call(layer, parameters, (x,)).square().mean()

        gradients = vmap(grad(loss), (None, 0))(parameters, x_BND)
        for index in range(2):
            for name, expected in grad(loss)(parameters, x_BND[index]).items():
                torch.testing.assert_close(
                    gradients[name][index], expected, rtol=1e-4, atol=1e-7, msg=name
                )


@covers("24 gradcheck")
def test_gradcheck(dense, inputs):
    model = ecomoe.convert(dense.double(), init="noise", **SETTINGS)
    for layer, x_ND in probe(model, inputs):
        x_ND = x_ND[:4].requires_grad_()
        assert torch.autograd.gradcheck(layer, (x_ND,), fast_mode=True)


@covers("24 script")
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_script_is_refused(dense):
    model = ecomoe.convert(dense, **SETTINGS)
    with pytest.raises(ValueError, match=r"cannot be compiled by torch\.jit\.script.*export"):
        torch.jit.script(model)


@covers("24 export", slow=True)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_export_with_a_dynamic_batch(dense):
    """An exported model takes batches of another size."""
    model = ecomoe.convert(dense, init="noise", **SETTINGS)
    for module in model.modules():
        if hasattr(module, "config"):
            module.config.use_cache = False  # an exported program has no cache to return
    inputs = inputs_of(model, batch=2)
    shapes = {name: {0: torch.export.Dim("batch")} for name in inputs}
    with torch.no_grad():
        exported = torch.export.export(model, (), inputs, dynamic_shapes=shapes)
        for batch in (3, 5):
            inputs = inputs_of(model, batch=batch)
            output = exported.module()(**inputs)
            got = output if isinstance(output, torch.Tensor) else output[0]
            assert relative_error(got, run(model, inputs)) < TOLERANCE[torch.float32]
