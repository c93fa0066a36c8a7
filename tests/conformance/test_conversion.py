"""What a converted model must still do, on the models of both libraries that stand for the rest."""

import copy
import io
import warnings

import pytest
import timm
import torch
from torch import nn

import ecomoe
from ecomoe.integrations.tiny import inputs_for, tiny_model

FAMILIES = ("gpt2", "llama", "bert", "t5", "opt", "albert", "whisper", "vit", "convnext")
IMAGES = dict(img_size=32, num_classes=5)
CONVNEXT = dict(num_classes=5, depths=(1, 1, 0, 0), dims=(16, 32, 32, 32))
TIMM = {
    "timm ViT": lambda: timm.models.VisionTransformer(
        **IMAGES, patch_size=8, embed_dim=32, depth=2, num_heads=2
    ),
    "timm Swin": lambda: timm.models.SwinTransformer(
        **IMAGES,
        patch_size=4,
        embed_dim=16,
        depths=(1, 1),
        num_heads=(2, 2),
        window_size=4,
        drop_path_rate=0,
    ),
    "timm ConvNeXt": lambda: timm.models.ConvNeXt(**CONVNEXT),
    "timm ConvNeXt of convolutions": lambda: timm.models.ConvNeXt(**CONVNEXT, conv_mlp=True),
    "timm EVA": lambda: timm.models.Eva(
        **IMAGES,
        patch_size=8,
        embed_dim=32,
        depth=2,
        num_heads=2,
        swiglu_mlp=True,
        scale_mlp=True,
        use_rot_pos_emb=True,
    ),
    "timm Mixer": lambda: timm.models.MlpMixer(**IMAGES, patch_size=8, num_blocks=2, embed_dim=32),
}
MODELS = [*FAMILIES, *TIMM]
SETTINGS = dict(tiers=(2, 1, 1), verbose=False)

# Matrices in another grouping round differently: relative to the greatest output.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


@pytest.fixture(params=MODELS)
def dense(request):
    torch.manual_seed(0)
    name = request.param
    model = TIMM[name]() if name in TIMM else tiny_model(name)
    with torch.no_grad():
        for parameter in model.parameters():  # off 0 and off LayerScale's 1e-6
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture
def inputs(dense):
    torch.manual_seed(1)
    return inputs_for(dense) if hasattr(dense, "config") else {"x": torch.randn(2, 3, 32, 32)}


def run(model, inputs):
    dtype = next(model.parameters()).dtype
    cast = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}
    output = model(**cast)
    return output if isinstance(output, torch.Tensor) else output[0]


def layers_of(model):
    return [m for m in model.modules() if isinstance(m, ecomoe.EcoMoE)]


def relative_error(got, want):
    return ((got - want).abs().max() / want.abs().max()).item()


def step(model, inputs):
    """One training step's gradients, by name."""
    model.zero_grad()
    (run(model, inputs).float().square().mean() + ecomoe.aux_loss(model)).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_exact_copies_in_every_dtype(dense, inputs, dtype):
    """Checks 1 and 8: dense-equivalent, the output's dtype kept, the router at least fp32."""
    dense.to(dtype)
    want = run(dense, inputs)
    ecomoe.convert(dense, **SETTINGS)
    got = run(dense, inputs)
    assert got.dtype == want.dtype
    assert relative_error(got.double(), want.double()) < TOLERANCE[dtype]
    for layer in layers_of(dense):
        assert layer.router.score.weight.dtype == torch.promote_types(dtype, torch.float32)


def test_every_block_is_converted(dense):
    ecomoe.convert(dense, **SETTINGS)
    blocks = {"AlbertModel": 1, "T5Model": 4, "WhisperModel": 4}.get(type(dense).__name__, 2)
    assert len(layers_of(dense)) == blocks


def test_state(dense, inputs):
    """Checks 2, 3 and 4: state dict, deepcopy and pickle after a training step, no statistics."""
    model = ecomoe.convert(copy.deepcopy(dense), init="noise", **SETTINGS).train()
    keys = list(model.state_dict())
    step(model, inputs)
    assert list(model.state_dict()) == keys
    model.eval()
    want = run(model, inputs)
    twin = ecomoe.convert(copy.deepcopy(dense), **SETTINGS)
    twin.load_state_dict(model.state_dict(), strict=True)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for copied in (twin.eval(), copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert torch.equal(run(copied, inputs), want)


def test_meta(dense, inputs):
    """Check 7: conversion without memory, weights afterwards."""
    model = ecomoe.convert(copy.deepcopy(dense), init="noise", **SETTINGS)
    empty = ecomoe.convert(copy.deepcopy(dense).to("meta"), **SETTINGS)
    assert all(t.is_meta for layer in layers_of(empty) for t in layer.state_dict().values())
    layers = {n: m for n, m in model.named_modules() if isinstance(m, ecomoe.EcoMoE)}
    for name, layer in layers.items():
        empty.get_submodule(name).load_state_dict(layer.state_dict(), assign=True)
        holder, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(holder), attribute, empty.get_submodule(name))
    again = run(model, inputs)
    for name, layer in layers.items():
        holder, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(holder), attribute, layer)
    assert torch.equal(run(model, inputs), again)


def test_autocast(dense, inputs):
    """Check 9: under autocast the converted model stays near the dense one, routers in fp32."""
    with torch.autocast("cpu", torch.bfloat16):
        want = run(dense, inputs)
        ecomoe.convert(dense, **SETTINGS)
        logits = []
        for layer in layers_of(dense):
            layer.router.register_forward_hook(lambda m, i, routing: logits.append(routing[0]))
        got = run(dense, inputs)
    assert {z.dtype for z in logits} == {torch.float32}
    assert relative_error(got.double(), want.double()) < TOLERANCE[torch.bfloat16]


def test_training_reaches_every_parameter(dense, inputs):
    """Check 13: an expert without tokens has zeros for a gradient, and nothing has none."""
    ecomoe.convert(dense, **SETTINGS).train()
    gradients = step(dense, inputs)
    for name, module in dense.named_modules():
        if isinstance(module, ecomoe.EcoMoE):
            for parameter, _ in module.named_parameters():
                assert gradients[f"{name}.{parameter}"].isfinite().all()


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(dense, inputs, reentrant):
    """Check 15: gradients with and without checkpointing are equal."""
    ecomoe.convert(dense, **SETTINGS).train()
    _without_dropout(dense)
    want = _task_gradients(dense, inputs)
    if hasattr(dense, "config"):
        if not dense.supports_gradient_checkpointing:
            pytest.skip("the family has no checkpointing")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            dense.gradient_checkpointing_enable({"use_reentrant": reentrant})
    elif reentrant:
        pytest.skip("timm checkpoints without reentrance")
    else:
        dense.set_grad_checkpointing()
    got = _task_gradients(dense, inputs)
    for name, gradient in want.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-4, atol=1e-6)


def _without_dropout(model):
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("dropout", "activation_dropout", "output_dropout", "layerdrop"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def _task_gradients(model, inputs):
    # The auxiliary loss under reentrant checkpointing is a Monitor's business.
    model.zero_grad()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        run(model, inputs).float().square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_evaluation_draws_nothing_and_leaves_nothing(dense, inputs):
    """Checks 23 and 25: same seed bit-equal; evaluation draws no number and emits no loss."""
    torch.manual_seed(2)
    model = ecomoe.convert(copy.deepcopy(dense), init="noise", **SETTINGS)
    torch.manual_seed(2)
    again = ecomoe.convert(dense, init="noise", **SETTINGS)
    state = torch.get_rng_state()
    assert torch.equal(run(model, inputs), run(again, inputs))
    assert torch.equal(torch.get_rng_state(), state)
    assert ecomoe.aux_loss(model) == 0


def test_weight_decay_spares_biases(dense):
    """Check 25: optimizers that go by ``.bias`` or by one axis spare experts' biases."""
    ecomoe.convert(dense, **SETTINGS)
    for layer in layers_of(dense):
        for name, parameter in layer.experts.named_parameters():
            assert (parameter.dim() <= 2) == (name.endswith("bias") or parameter.dim() == 1)


def test_a_layer_called_several_times_counts_once():
    """Check 25: ALBERT calls one layer twice; its loss is the mean over the calls."""
    torch.manual_seed(0)
    model = ecomoe.convert(tiny_model("albert"), **SETTINGS).train()
    calls = []
    (layer,) = layers_of(model)
    layer.register_forward_hook(
        lambda m, i, o: calls.append(
            sum(m.term_weights()[k] * v for k, v in m.auxiliary.terms.items())
        )
    )
    run(model, inputs_for(model))
    assert len(calls) == 2
    torch.testing.assert_close(ecomoe.aux_loss(model), sum(calls) / 2)


def test_feed_forward_in_chunks_is_the_same():
    """Check 14: transformers may call a block on slices of the sequence."""
    torch.manual_seed(0)
    model = tiny_model("bert", chunk_size_feed_forward=3).eval()
    inputs = inputs_for(model)
    want = run(model, inputs)
    ecomoe.convert(model, **SETTINGS)
    assert relative_error(run(model, inputs), want) < TOLERANCE[torch.float32]


@pytest.mark.slow
@pytest.mark.parametrize("name", TIMM)
def test_compiled_in_one_graph(name):
    """Check 21: the converted model compiles into one graph and equals eager."""
    torch.manual_seed(0)
    model = ecomoe.convert(TIMM[name](), **SETTINGS).eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True)
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["timm ViT", "timm ConvNeXt of convolutions"])
def test_export_with_a_dynamic_batch(name):
    """Check 24: an exported model takes batches of another size."""
    torch.manual_seed(0)
    model = ecomoe.convert(TIMM[name](), init="noise", **SETTINGS).eval()
    batch = {0: torch.export.Dim("batch")}
    with torch.no_grad():
        exported = torch.export.export(
            model, (torch.randn(2, 3, 32, 32),), dynamic_shapes={"x": batch}
        )
        x = torch.randn(5, 3, 32, 32)
        torch.testing.assert_close(exported.module()(x), model(x), rtol=1e-4, atol=1e-5)


def test_functional_gradient():
    """Check 24: `torch.func.grad` gives what autograd gives."""
    torch.manual_seed(0)
    model = ecomoe.convert(TIMM["timm ViT"](), init="noise", **SETTINGS).eval()
    x = torch.randn(2, 3, 32, 32)
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())

    def loss(parameters):
        return torch.func.functional_call(model, (parameters, buffers), (x,)).square().mean()

    got = torch.func.grad(loss)(parameters)
    want = torch.autograd.grad(loss(parameters), list(parameters.values()))
    for gradient, expected in zip(got.values(), want, strict=True):
        torch.testing.assert_close(gradient, expected)
