"""The registries name classes that exist, and the census measures what it says."""

import importlib
import os
import re
from pathlib import Path

import pytest
import torch
from torch import nn

timm = pytest.importorskip("timm")
transformers = pytest.importorskip("transformers")

from ecomoe.integrations import census, huggingface_blocks  # noqa: E402
from ecomoe.integrations import timm as timm_adapter  # noqa: E402
from ecomoe.integrations.tiny import FAMILIES, inputs_for, tiny_model  # noqa: E402


def test_every_class_of_transformers_that_has_a_rule_exists():
    models = Path(transformers.__file__).parent / "models"
    defined = {
        (path.stem, name)
        for path in models.glob("*/modeling_*.py")
        for name in re.findall(r"^class (\w+)", path.read_text(), flags=re.MULTILINE)
    }
    for rule in huggingface_blocks.RULES:
        *module, name = rule.split(".")
        stems = {stem for stem, defined_name in defined if defined_name == name}
        assert stems, f"{rule} is no class of transformers {transformers.__version__}"
        assert not module or module[-1] in stems


def test_a_name_without_its_module_means_the_same_everywhere():
    """Two families may call their class alike only if it keeps its parts alike."""
    models = Path(transformers.__file__).parent / "models"
    bodies = {}
    for path in models.glob("*/modeling_*.py"):
        for name, body in re.findall(
            r"^class (\w+)\(.*?\n(.*?)(?=^\S|\Z)", path.read_text(), flags=re.MULTILINE | re.DOTALL
        ):
            if name in huggingface_blocks.RULES:
                parts = frozenset(re.findall(r"self\.(\w+)\(", body))
                bodies.setdefault(name, set()).add(parts)
    assert {name for name, variants in bodies.items() if len(variants) > 1} <= {"Qwen2MLP"}


def test_every_class_of_timm_that_has_a_rule_exists():
    for rule in timm_adapter.RULES:
        module, _, name = rule.rpartition(".")
        package = "timm" if module.startswith("layers.") else "timm.models"
        assert hasattr(importlib.import_module(f"{package}.{module}"), name), rule


def test_check_finds_a_wrong_copy(monkeypatch):
    """The comparison has the power to see a bias that was left out."""
    upcycle = importlib.import_module("ecomoe.upcycle")
    model = tiny_model("gpt2")
    inputs = inputs_for(model)
    blocks, reached, difference = census.check(model, lambda m: m(**inputs))
    assert (blocks, reached) == (2, 2)
    assert difference < 1e-5
    monkeypatch.setattr(upcycle.Projection, "of", classmethod(_without_bias))
    _, _, difference = census.check(tiny_model("gpt2"), lambda m: m(**inputs))
    assert difference > 1e-3


def _without_bias(cls, weight, bias):
    return cls(weight.detach(), torch.zeros_like(bias.detach()), True, True)


def test_layer_that_is_never_called_is_told():
    class Idle(nn.Module):
        def __init__(self):
            super().__init__()
            self.mlp = timm.layers.Mlp(8, 16)
            self.head = nn.Linear(8, 2)

        def forward(self, x):
            return self.head(x)

    with pytest.raises(RuntimeError, match="no layer was called"):
        census.check(Idle(), lambda m: m(torch.ones(1, 8)))


def test_a_model_that_blows_up_rounding_is_compared_in_fp64(monkeypatch):
    monkeypatch.setattr(census, "BOUND", 0.0)
    entry = census.check_timm(census.Entry("test_vit", "vision_transformer"))
    assert entry.difference > entry.double
    assert entry.double < 1e-12
    text = census.report([entry], [entry], [])
    assert f"test_vit differs by {entry.difference:.1e} in fp32" in text


def test_a_process_that_dies_is_an_error_of_its_model_alone():
    entry = census._in_fresh_process(_die, census.Entry("a", "g"))
    assert "BrokenProcessPool" in entry.error
    assert not census._in_fresh_process(_live, census.Entry("b", "g")).error


def _die(entry):
    os._exit(1)


def _live(entry):
    return entry


def test_smallest_takes_the_cheapest_that_converts():
    entries = [
        census.Entry("a", "g", blocks=2, cost=5),
        census.Entry("b", "g", blocks=1, cost=3),
        census.Entry("c", "g", blocks=0, cost=1),
        census.Entry("d", "h", blocks=0, cost=1),
    ]
    assert [entry.name for entry in census.smallest(entries)] == ["b"]


def test_report_counts_and_lists_errors():
    entries = [
        census.Entry("a", "g", blocks=2),
        census.Entry("b", "h", refused=("it pools",)),
        census.Entry("c", "i"),
    ]
    runs = [census.Entry("a", "g", blocks=2, reached=1, checked=True, difference=2e-7)]
    families = [census.Entry("bert", "encoder", error="RuntimeError: no", checked=True)]
    text = census.report(entries, runs, families)
    assert "1 of 3 registered models convert; 1 were run; 0 errors" in text
    assert "| g | 1 | 1 | a | 2 (1 run) | 2.0e-07 |  |" in text
    assert "| h | 1 | 0 |  |  |  | it pools |" in text
    assert "No feed-forward block, by module (models): i (1)." in text
    assert "- bert: RuntimeError: no" in text


def test_heads_and_attention_are_left_alone():
    for name, kept in (
        ("test_mambaout", "head"),
        ("mixer_s32_224", "mlp_tokens"),
        ("gcresnet33ts", "mlp_add"),
        ("vit_relpos_base_patch16_rpn_224", "rel_pos"),
    ):
        with torch.device("meta"):
            model = timm.create_model(name)
        try:
            names = [block.name for block in census.find_blocks(model)[0]]
        except ValueError:
            names = []
        assert not [found for found in names if kept in found.split(".")]


@pytest.mark.slow
@pytest.mark.parametrize("model_type", FAMILIES[::8])
def test_a_sample_of_families(model_type):
    entry = census.check_family(census.Entry(model_type, ""))
    assert not entry.error
    assert entry.difference < 1e-5


@pytest.mark.slow
def test_the_command(tmp_path):
    output = tmp_path / "coverage.md"
    assert (
        census.main(["--timm", "test_[cemv]*", "--families", "bert", "--output", str(output)]) == 0
    )
    text = output.read_text()
    assert "| vision_transformer |" in text
    assert "1 families convert" in text
