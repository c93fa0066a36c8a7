"""The monitor's counts against what the experts execute, for every family of transformers."""

import inspect
import warnings

import pytest
import torch
from families import family_names, tiny_model
from torch import nn

import ecomoe

# One of each shape of router; the rest are slow tests.
SHAPES = ["mixtral", "dbrx", "deepseek_v3", "doge", "gemma4", "jetmoe", "llama4", "zaya"]
SHAPES += ["switch_transformers", "nllb_moe"]
# In transformers 5.23 this block hands its 0/1 dispatch mask to the experts as if it held expert
# ids, so that expert 0 computes nearly everything, whatever the router decides.
REFUSED = {"nllb_moe"}

IDS = torch.tensor([[5, 9, 13, 17, 21, 25, 29], [6, 10, 14, 18, 22, 26, 30]])
MASK = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0, 0]])


class Executed:
    """Counts, by layer, the tokens that each expert computes, from the calls of the experts."""

    def __init__(self, model, *, padded):
        self.valid_N = (MASK if padded else torch.ones_like(MASK)).reshape(-1).bool()
        self.counts = {}
        self.on = True
        for name, module in model.named_modules():
            kind = type(module).__name__
            if kind == "JetMoeParallelExperts" and name.endswith("input_linear"):
                holder = name.removesuffix(".input_linear").removesuffix(".experts")
                self.wrap(module, holder, self.by_sizes)
            elif kind == "DogeCDMoE":
                self.wrap(module.down_embed, name, self.by_ids)
            elif kind == "Llama4TextExperts":
                self.wrap(module, name.removesuffix(".experts"), self.by_rows)
            elif name.split(".")[-1] == "experts" and kind != "JetMoeMoA":
                self.wrap(module, name.removesuffix("experts").removesuffix("."), self.by_ids)

    def wrap(self, module, holder, read):
        forward = module.forward
        signature = inspect.signature(forward)

        def wrapped(*args, **kwargs):
            if self.on:
                bound = signature.bind(*args, **kwargs).arguments
                self.counts[holder] = self.counts.get(holder, 0) + read(module, bound)
            return forward(*args, **kwargs)

        module.forward = wrapped

    def valid(self, num_tokens):
        # Of an encoder-decoder model, the decoder's side has no padding here.
        return self.valid_N if num_tokens == len(self.valid_N) else torch.ones(num_tokens).bool()

    def by_ids(self, module, bound):
        tensors = list(bound.values())
        ids = next(t for t in tensors if not t.is_floating_point())
        num_columns = 64
        if ids.dim() == 3:
            return ids[self.valid(len(ids))].sum((0, 1))
        kept = torch.ones_like(ids, dtype=torch.bool)
        if type(module).__name__ == "ZayaExperts":
            kept = tensors[2] != 0  # its skipped tokens come as expert 0 with a gate of 0
        valid = self.valid(len(ids))
        return ids[valid][kept[valid]].bincount(minlength=num_columns)

    def by_rows(self, module, bound):
        rows = next(iter(bound.values())).detach()
        took_EN = rows.view(module.num_experts, -1, rows.shape[-1]).abs().sum(-1) > 0
        return (took_EN & self.valid_N).sum(1)

    def by_sizes(self, module, bound):
        return torch.tensor(bound["expert_size"])


def inputs_of(model, *, padded):
    given = {"input_ids": IDS}
    if padded:
        given["attention_mask"] = MASK
    if "decoder_input_ids" in inspect.signature(model.forward).parameters:
        given["decoder_input_ids"] = IDS[:, :4]
    return given


def without_dropout(model):
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def check(family, *, training, padded, checkpointing):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the configurations', not the monitor's
        model = without_dropout(tiny_model(family)).train(training)
        if checkpointing:
            try:
                model.gradient_checkpointing_enable({"use_reentrant": False})
            except ValueError as error:
                pytest.skip(str(error))
        if family == "jetmoe":
            padded = False  # its experts are told how many tokens come, not which
        executed = Executed(model, padded=padded)
        with ecomoe.Monitor(model, view="off") as monitor:
            output = model(**inputs_of(model, padded=padded))
            executed.on = False
            if checkpointing:
                output[0].sum().backward()
            report = monitor.report("train" if training else "eval").to_dict()
    found = {layer["name"]: layer for layer in report["layers"]}
    executed.counts = {name: counts for name, counts in executed.counts.items() if name in found}
    assert found
    assert set(found) == set(executed.counts)
    for name, layer in found.items():
        counts = executed.counts[name]
        num_experts = layer["num_experts"]
        expected = counts[:num_experts].tolist() + [0] * (num_experts - len(counts))
        assert not counts[num_experts:].any()
        if family == "zaya":
            assert layer["counts"]["topk"][-1] == layer["num_tokens"] - sum(expected)
            layer["counts"]["topk"][-1] = 0
        assert layer["counts"]["topk"] == expected, name


VARIANTS = [
    pytest.param({"training": True, "padded": True, "checkpointing": False}, id="train"),
    pytest.param({"training": True, "padded": True, "checkpointing": True}, id="checkpointing"),
    pytest.param({"training": False, "padded": True, "checkpointing": False}, id="eval"),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", [name for name in SHAPES if name not in REFUSED])
def test_counts_are_what_experts_execute(family, variant):
    check(family, **variant)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    "family", [name for name in family_names() if name not in {*SHAPES, *REFUSED}]
)
def test_counts_are_what_experts_execute_everywhere(family, variant):
    check(family, **variant)


@pytest.mark.filterwarnings("ignore:layer .* is left out of the report:UserWarning")
@pytest.mark.parametrize("family", sorted(REFUSED))
def test_disagreement_is_refused_and_told(family):
    model = tiny_model(family)
    with ecomoe.Monitor(model, view="off") as monitor:
        model(**inputs_of(model, padded=False))
        with (
            pytest.warns(UserWarning, match="left out") as told,
            pytest.raises(ValueError, match="no token was"),
        ):
            monitor.report()
    assert len(told) == 4
    for warning in told:
        assert "but its experts received [" in str(warning.message)


def test_every_family_is_in_one_of_the_tests():
    assert len(family_names()) >= 72
    assert set(SHAPES) <= set(family_names())
