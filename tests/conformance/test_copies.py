"""Converted models copied, pickled, saved and loaded."""

import copy
import io
import json
import subprocess
import sys

import pytest
import timm
import torch
import transformers
from matrix import MODELS, SETTINGS, TIMM, build, covers, inputs_of, run, step

import ecomoe


@pytest.fixture(autouse=True)
def _quiet():
    transformers.utils.logging.disable_progress_bar()


@covers("2", "3", "4", "25 average")
def test_state(dense, inputs):
    """State dict, deepcopy, pickle and an average's copy after a training step."""
    model = ecomoe.convert(copy.deepcopy(dense), init="noise", **SETTINGS).train()
    keys = list(model.state_dict())
    step(model, inputs)
    assert list(model.state_dict()) == keys
    average = timm.utils.ModelEmaV3(model, decay=0.5)
    model.eval()
    want = run(model, inputs)
    twin = ecomoe.convert(copy.deepcopy(dense), **SETTINGS)
    twin.load_state_dict(model.state_dict(), strict=True)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    for copied in (twin.eval(), copy.deepcopy(model), loaded, average.module.eval()):
        assert torch.equal(run(copied, inputs), want)
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    average.update(model)
    layers = [n for n, m in model.named_modules() if isinstance(m, ecomoe.EcoMoE)]
    for layer in layers:  # elsewhere timm averages tied weights twice
        for name, parameter in average.module.get_submodule(layer).named_parameters():
            want = before[f"{layer}.{name}"] + 0.5
            torch.testing.assert_close(parameter, want, atol=1e-5, rtol=1e-5)


def save(model, folder):
    if hasattr(model, "config"):
        model.save_pretrained(folder)
    else:
        timm.models.save_for_hf(model, folder, safe_serialization=True)


@covers("5")
def test_saved_and_loaded(tmp_path, dense, inputs):
    model = ecomoe.convert(dense, init="noise", **SETTINGS)
    save(model, tmp_path)
    assert not list(tmp_path.glob("*.bin"))
    loaded = ecomoe.from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    got, want = loaded.state_dict(), model.state_dict()
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert got[name].dtype == tensor.dtype, name
        assert torch.equal(got[name], tensor), name
    assert all(b.isfinite().all() for b in loaded.buffers() if b.is_floating_point())
    assert torch.equal(run(loaded, inputs), run(model, inputs))


# One process for all models: importing both libraries takes seconds.
_WITHOUT_ECOMOE = """
import json, sys, timm, transformers
problems = {}
for name, (auto, folder) in json.loads(sys.argv[1]).items():
    try:
        if auto:
            getattr(transformers, auto).from_pretrained(folder)
        else:
            timm.create_model("local-dir:" + folder, pretrained=True)
    except Exception as problem:
        problems[name] = str(problem)
assert "ecomoe" not in sys.modules
print(json.dumps(problems))
"""


@pytest.fixture(scope="module")
def problems_without_ecomoe(tmp_path_factory):
    saved = {}
    for name in MODELS:
        folder = tmp_path_factory.mktemp("saved")
        save(ecomoe.convert(build(name), **SETTINGS), folder)
        saved[name] = ("" if name in TIMM else "AutoModel", str(folder))
    done = subprocess.run(
        [sys.executable, "-c", _WITHOUT_ECOMOE, json.dumps(saved)],
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


@covers("6", slow=True)
def test_loading_without_ecomoe_fails(problems_without_ecomoe, name):
    assert "ecomoe" in problems_without_ecomoe.get(name, "")


@covers("23", "25 evaluation")
def test_evaluation_draws_nothing_and_leaves_nothing(name):
    """Same seed, same bits, training included; evaluation draws no number and emits no loss."""
    dense = build(name)
    inputs = inputs_of(dense)
    models = []
    for _ in range(2):
        torch.manual_seed(2)
        models.append(ecomoe.convert(copy.deepcopy(dense), init="noise", **SETTINGS))
    model, again = models
    state = torch.get_rng_state()
    assert torch.equal(run(model, inputs), run(again, inputs))
    assert torch.equal(torch.get_rng_state(), state)
    assert ecomoe.aux_loss(model) == 0
    torch.use_deterministic_algorithms(True)
    try:
        gradients = []
        for each in models:
            torch.manual_seed(3)
            gradients.append(step(each.train(), inputs))
    finally:
        torch.use_deterministic_algorithms(False)
    for parameter, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][parameter]), parameter
