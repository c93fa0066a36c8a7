"""Saving and loading converted models: bit-equal, loud where it cannot be, nothing unpickled."""

import copy
import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import ecomoe
from ecomoe.convert import LOST

timm = pytest.importorskip("timm")
transformers = pytest.importorskip("transformers")

from ecomoe.integrations.tiny import inputs_for, tiny_model  # noqa: E402

ROOT = Path(__file__).parent.parent

# Each with the class that has a head, and the kinds of block that the issue names: Conv1D, gated,
# split, encoder-decoder, inline, shared, audio, vision, inline vision, parts with their own config.
FAMILIES = {
    "gpt2": "AutoModelForCausalLM",
    "llama": "AutoModelForCausalLM",
    "bert": "AutoModelForMaskedLM",
    "t5": "AutoModelForSeq2SeqLM",
    "opt": "AutoModelForCausalLM",
    "albert": "AutoModelForSequenceClassification",
    "whisper": "AutoModelForSpeechSeq2Seq",
    "vit": "AutoModelForImageClassification",
    "swiftformer": "AutoModelForImageClassification",
    "bart": "AutoModelForSeq2SeqLM",
    "clip": "AutoModel",
}


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)


def converted(model_type, auto="AutoModel", **settings):
    model = tiny_model(model_type, auto=auto).eval()
    return ecomoe.convert(model, init="noise", verbose=False, **settings)


def output(model, inputs):
    with torch.no_grad():
        return model(**inputs)[0]


def assert_same_state(got, want):
    got, want = got.state_dict(), want.state_dict()
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert got[name].dtype == tensor.dtype, name
        assert torch.equal(got[name], tensor), name


@pytest.mark.parametrize(("model_type", "auto"), FAMILIES.items())
def test_transformers_round_trip_is_bit_equal(tmp_path, model_type, auto):
    model = converted(model_type, auto, tiers=(2, 2))
    inputs = inputs_for(model)
    want = output(model, inputs)
    model.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.bin"))
    for loaded in (
        ecomoe.from_pretrained(tmp_path),
        getattr(transformers, auto).from_pretrained(tmp_path),
    ):
        assert type(loaded) is type(model)
        assert_same_state(loaded, model)
        assert not any(b.isnan().any() for b in loaded.buffers() if b.is_floating_point())
        assert torch.equal(output(loaded, inputs), want)


def test_second_generation_and_second_conversion(tmp_path):
    model = converted("gpt2", "AutoModelForCausalLM", layers=0, tiers=(4,), oracle_weight=0.1)
    ecomoe.convert(model, tiers=(2,), top_k=1, warmup_fraction=0.1, verbose=False)
    model.transformer.h[0].mlp.set_progress(0.7)
    model.save_pretrained(tmp_path / "1")
    ecomoe.from_pretrained(tmp_path / "1").save_pretrained(tmp_path / "2")
    loaded = ecomoe.from_pretrained(tmp_path / "2")
    assert_same_state(loaded, model)
    assert [h.mlp.num_experts for h in loaded.transformer.h] == [4, 2]
    assert loaded.transformer.h[0].mlp.control == model.transformer.h[0].mlp.control


def test_base_model_loads_from_one_with_a_head(tmp_path):
    model = converted("gpt2", "AutoModelForCausalLM")
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModel.from_pretrained(tmp_path)
    assert type(loaded) is transformers.GPT2Model
    assert_same_state(loaded, model.transformer)
    model.transformer.save_pretrained(tmp_path / "base")
    loaded = ecomoe.from_pretrained(tmp_path / "base")
    assert_same_state(loaded, model.transformer)


def test_a_twin_built_from_the_same_configuration_stays_dense(tmp_path):
    dense = tiny_model("gpt2", auto="AutoModelForCausalLM")
    twin = type(dense)(dense.config)
    ecomoe.convert(twin, verbose=False)
    assert getattr(dense.config, "ecomoe", None) is None
    assert twin.config is twin.transformer.config
    dense.save_pretrained(tmp_path)
    loaded = type(dense).from_pretrained(tmp_path)
    assert not any(isinstance(module, ecomoe.EcoMoE) for module in loaded.modules())


def test_a_model_inside_another_module_is_marked_too(tmp_path):
    class Classifier(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = tiny_model("gpt2").eval()

    model = ecomoe.convert(Classifier(), verbose=False)
    model.body.save_pretrained(tmp_path)
    assert_same_state(ecomoe.from_pretrained(tmp_path), model.body)


def test_routers_stay_wide(tmp_path):
    model = converted("llama", "AutoModelForCausalLM", ortho_weight=0.1)
    model.save_pretrained(tmp_path)
    for dtype in (torch.bfloat16, torch.float16):
        loaded = ecomoe.from_pretrained(tmp_path, dtype=dtype)
        layer, original = loaded.model.layers[0].mlp, model.model.layers[0].mlp
        assert layer.experts.gate_up_proj.weight.dtype == dtype
        for name in ("router.score.weight", "temperature", "prototypes"):
            assert torch.equal(layer.state_dict()[name], original.state_dict()[name])
    model.to(torch.bfloat16).save_pretrained(tmp_path / "half")
    assert_same_state(ecomoe.from_pretrained(tmp_path / "half"), model)


def test_dense_oracle_is_saved_with_the_model(tmp_path):
    model = converted("gpt2", oracle="dense", oracle_weight=0.1)
    model.save_pretrained(tmp_path)
    assert_same_state(ecomoe.from_pretrained(tmp_path), model)


def test_an_oracle_of_ones_own_is_asked_for_again(tmp_path):
    def oracle(x_ND):
        return torch.full((x_ND.shape[0], 16), 1 / 16)

    model = converted("gpt2", oracle=oracle, oracle_weight=0.1)
    assert model.config.ecomoe[0]["oracle"] == LOST
    model.save_pretrained(tmp_path)
    loaded = ecomoe.from_pretrained(tmp_path)
    inputs = inputs_for(loaded)
    assert torch.equal(output(loaded, inputs), output(model, inputs))
    with pytest.raises(ValueError, match=r"set layer.oracle"):
        loaded.train()(**inputs)


def test_configuration_alone_builds_layers(tmp_path):
    converted("gpt2").config.save_pretrained(tmp_path)
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    model = transformers.AutoModelForCausalLM.from_config(config)
    assert type(model) is transformers.GPT2LMHeadModel
    assert all(isinstance(block.mlp, ecomoe.EcoMoE) for block in model.transformer.h)
    assert all(p.isfinite().all() for p in model.parameters())


def test_copies_and_pickles():
    model = converted("gpt2")
    inputs = inputs_for(model)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_same_state(copied, model)
        assert torch.equal(output(copied, inputs), output(model, inputs))


def test_loaded_model_pickles_and_trains(tmp_path):
    converted("gpt2", "AutoModelForCausalLM").save_pretrained(tmp_path)
    model = pickle.loads(pickle.dumps(ecomoe.from_pretrained(tmp_path))).train()
    inputs = inputs_for(model)
    loss = model(**inputs, labels=inputs["input_ids"]).loss + ecomoe.aux_loss(model)
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())


# Loud failures


def test_missing_weights_raise(tmp_path):
    from safetensors.torch import load_file, save_file

    converted("gpt2").save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    key = next(key for key in weights if key.endswith("router.score.weight"))
    del weights[key]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="lacks 1 weights of EcoMoE layers"):
        ecomoe.from_pretrained(tmp_path)


def test_a_dense_model_is_none_of_ours(tmp_path):
    tiny_model("gpt2").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="gpt2 model without EcoMoE layers"):
        ecomoe.from_pretrained(tmp_path)
    assert isinstance(transformers.AutoModel.from_pretrained(tmp_path), transformers.GPT2Model)
    with pytest.raises(ValueError, match=r"config.json must be a file"):
        ecomoe.from_pretrained(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="names neither"):
        ecomoe.from_pretrained(tmp_path)


# One process for several claims: importing transformers takes seconds.
_WITHOUT_THEN_WITH = """
import sys, timm, transformers
assert "ecomoe" not in sys.modules
def failure(load, *arguments, **keywords):
    try:
        load(*arguments, **keywords)
    except Exception as problem:
        print(problem)
for name in "GPT2LMHeadModel", "AutoModelForCausalLM":
    failure(getattr(transformers, name).from_pretrained, sys.argv[1])
failure(timm.create_model, "local-dir:" + sys.argv[2], pretrained=True)
import ecomoe
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])
print(type(model.transformer.h[0].mlp).__name__)
print(type(timm.create_model("local-dir:" + sys.argv[2], pretrained=True).blocks[0].mlp).__name__)
"""


def test_loading_without_ecomoe_raises_and_importing_it_then_helps(tmp_path):
    converted("gpt2", "AutoModelForCausalLM").save_pretrained(tmp_path / "gpt2")
    timm.models.save_for_hf(timm_model(), tmp_path / "vit", safe_serialization=True)
    lines = _run(_WITHOUT_THEN_WITH, tmp_path / "gpt2", tmp_path / "vit").splitlines()
    hint = "Unknown fusion type: ecomoe (this model was converted; import ecomoe, then load it"
    assert [line.startswith(hint) for line in lines[:2]] == [True, True]
    assert lines[2:] == ["Unknown model (ecomoe_converted)", "EcoMoE", "EcoMoE"]


def test_ecomoe_may_be_imported_first(tmp_path):
    converted("gpt2", "AutoModelForCausalLM").save_pretrained(tmp_path)
    program = (
        "import sys, ecomoe, transformers\n"
        "model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "print(type(model.transformer.h[0].mlp).__name__)"
    )
    assert _run(program, tmp_path).strip() == "EcoMoE"


def _run(program, *arguments):
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_part_with_a_configuration_of_its_own_raises_too(tmp_path):
    converted("clip").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="import ecomoe"):
        transformers.CLIPTextModel.from_pretrained(tmp_path)


def test_the_seam_in_transformers_is_where_it_was():
    from transformers.models.auto import auto_factory

    assert auto_factory._get_model_class.__wrapped__.__module__ == auto_factory.__name__


# timm


def timm_model(**settings):
    model = timm.create_model("test_vit", num_classes=7, img_size=32).eval()
    return ecomoe.convert(model, init="noise", tiers=(2, 2), verbose=False, **settings)


def test_timm_round_trip_is_bit_equal(tmp_path):
    model = timm_model(layers="every other")
    x = torch.randn(2, 3, 32, 32)
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
    for loaded in (
        ecomoe.from_pretrained(tmp_path),
        timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval(),
    ):
        assert type(loaded) is type(model)
        assert_same_state(loaded, model)
        assert torch.equal(loaded(x), model(x))
    again = tmp_path / "again"
    timm.models.save_for_hf(ecomoe.from_pretrained(tmp_path), again, safe_serialization=True)
    assert_same_state(ecomoe.from_pretrained(again), model)


def test_a_timm_model_inside_another_module_is_marked_too(tmp_path):
    body = timm.create_model("test_vit", num_classes=7, img_size=32).eval()
    ecomoe.convert(nn.ModuleDict({"body": body}), tiers=(2, 2), verbose=False)
    timm.models.save_for_hf(body, tmp_path, safe_serialization=True)
    assert_same_state(ecomoe.from_pretrained(tmp_path), body)


def test_a_timm_model_in_transformers_wrapper(tmp_path):
    config = transformers.TimmWrapperConfig(architecture="test_vit", num_labels=3)
    model = transformers.TimmWrapperForImageClassification(config).eval()
    ecomoe.convert(model, tiers=(2, 2), verbose=False)
    model.save_pretrained(tmp_path)
    assert_same_state(ecomoe.from_pretrained(tmp_path), model)


def test_timm_state_dict_and_average(tmp_path):
    model = timm_model()
    average = timm.utils.ModelEmaV3(model.train())
    (model(torch.randn(2, 3, 32, 32)).sum() + ecomoe.aux_loss(model)).backward()
    average.update(model)
    assert_same_state(copy.deepcopy(model), model)
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    fresh = timm_model()
    timm.models.load_checkpoint(fresh, tmp_path / "weights.pth")
    assert_same_state(fresh, model)


def test_timm_fails_loudly(tmp_path):
    timm.models.save_for_hf(timm_model(), tmp_path)
    with pytest.raises(ValueError, match="safe_serialization=True"):
        ecomoe.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="have no effect on timm models"):
        ecomoe.from_pretrained(tmp_path, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="only loads saved"):
        timm.create_model("ecomoe_converted")
    dense = tmp_path / "dense"
    timm.models.save_for_hf(timm.create_model("test_vit"), dense, safe_serialization=True)
    with pytest.raises(ValueError, match="test_vit without EcoMoE layers"):
        ecomoe.from_pretrained(dense)


def test_what_is_saved_is_plain_json(tmp_path):
    converted("gpt2").save_pretrained(tmp_path)
    (record,) = json.loads((tmp_path / "config.json").read_text())["ecomoe"]
    assert record["blocks"] == ["h.0.mlp", "h.1.mlp"]
    assert record["tiers"] == [8, 4, 4]


# Fine-tuning


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_lora_through_target_parameters(tmp_path):
    peft = pytest.importorskip("peft")
    model = converted("gpt2", "AutoModelForCausalLM", tiers=(2, 2))
    inputs = inputs_for(model)
    want = output(model, inputs)
    model_before = copy.deepcopy(model)
    config = peft.LoraConfig(
        r=2,
        target_modules=[],
        target_parameters=["mlp.experts.up_proj.weight", "mlp.experts.down_proj.weight"],
        lora_alpha=4,
    )
    tuned = peft.get_peft_model(model, config)
    trainable = [name for name, p in tuned.named_parameters() if p.requires_grad]
    assert len(trainable) == 2 * 2 * 2
    # Adapted experts are composed of single operators, whose GELU rounds differently.
    torch.testing.assert_close(output(tuned.eval(), inputs), want)
    optimizer = torch.optim.SGD([p for p in tuned.parameters() if p.requires_grad], lr=1.0)
    for _ in range(2):
        loss = tuned.train()(**inputs, labels=inputs["input_ids"]).loss
        (loss + ecomoe.aux_loss(tuned)).backward()
        optimizer.step()
    got = output(tuned.eval(), inputs)
    assert not torch.allclose(got, want)
    tuned.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.bin"))
    again = peft.PeftModel.from_pretrained(model_before, tmp_path).eval()
    assert torch.equal(output(again, inputs), got)
    merged = tuned.merge_and_unload()
    assert torch.allclose(output(merged, inputs), got, atol=1e-5)


# From the hub: its cache stands in for it, which is all that is asked when offline.


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A function that puts a saved model where the hub's client keeps a repository."""
    constants = pytest.importorskip("huggingface_hub").constants
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))

    def publish(model, name, *, revision="main"):
        repository = tmp_path / f"models--{name.replace('/', '--')}"
        (repository / "refs").mkdir(parents=True, exist_ok=True)
        commit = f"{len(list(repository.glob('snapshots/*'))):040x}"
        (repository / "refs" / revision).write_text(commit)
        folder = repository / "snapshots" / commit
        if hasattr(model, "config"):
            model.save_pretrained(folder)
        else:
            timm.models.save_for_hf(model, folder, safe_serialization=True)

    return publish


def test_a_name_on_the_hub(hub):
    first, second = converted("gpt2"), converted("gpt2")
    hub(first, "somebody/gpt2-moe")
    hub(second, "somebody/gpt2-moe", revision="later")
    assert_same_state(ecomoe.from_pretrained("somebody/gpt2-moe"), first)
    assert_same_state(ecomoe.from_pretrained("somebody/gpt2-moe", revision="later"), second)
    image = timm_model()
    hub(image, "somebody/vit-moe")
    assert_same_state(ecomoe.from_pretrained("somebody/vit-moe"), image)


def test_of_the_hub_only_configuration_and_safetensors_are_fetched():
    from huggingface_hub.utils import filter_repo_objects

    from ecomoe.loading import _FETCHED

    wanted = ["config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json"]
    others = ["pytorch_model.bin", "modeling_gpt2.py", "weights.pth", "weights.pkl", "README.md"]
    assert list(filter_repo_objects(wanted + others, allow_patterns=list(_FETCHED))) == wanted


@pytest.mark.parametrize("name", ["somebody/nothing", "out/gpt2/deeper", "no such place"])
def test_neither_directory_nor_repository(hub, name):
    with pytest.raises(ValueError, match=f"source='{name}' must be a directory, or a repository"):
        ecomoe.from_pretrained(name)


def test_a_revision_of_a_directory_is_refused(tmp_path):
    with pytest.raises(ValueError, match="revision='main' has no effect on the directory"):
        ecomoe.from_pretrained(tmp_path, revision="main")


def test_no_directory():
    with pytest.raises(ValueError, match="source=None must be a path or a name on the hub; pass"):
        ecomoe.from_pretrained(None)
