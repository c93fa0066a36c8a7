"""Fine-tuning, quantising and generating with converted models."""

import copy

import pytest
import torch
from matrix import (
    SETTINGS,
    WRITERS,
    build,
    covers,
    inputs_of,
    layers_of,
    relative_error,
    run,
    step,
)
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

import ecomoe

peft = pytest.importorskip("peft")

SIZES = dict(vocab_size=64, n_positions=32, n_embd=32, n_layer=2, n_head=2)
TOKENS = dict(bos_token_id=0, eos_token_id=0, loss_type="ForCausalLM")


def lora_model():
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(**SIZES, **TOKENS))
    ecomoe.convert(model, tiers=(2, 2), init="noise", verbose=False)
    config = peft.LoraConfig(
        r=2,
        target_modules=[],
        target_parameters=["mlp.experts.up_proj.weight", "mlp.experts.down_proj.weight"],
        modules_to_save=["router"],
        lora_dropout=0.0,
    )
    return peft.get_peft_model(model, config)


def train(folder, *, resume=None):
    generator = torch.Generator().manual_seed(1)
    ids = (torch.rand(32, 16, generator=generator) ** 2 * 64).long()
    data = [{"input_ids": row, "labels": row} for row in ids]
    arguments = TrainingArguments(
        output_dir=folder,
        max_steps=6,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        bf16=True,
        use_cpu=True,
        activation_checkpointing=True,
        activation_checkpointing_kwargs={"use_reentrant": False},
        save_steps=3,
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
        seed=3,
    )
    trainer = Trainer(
        model=lora_model(),
        args=arguments,
        train_dataset=data,
        callbacks=[ecomoe.Monitor()],
    )
    trainer.train(resume_from_checkpoint=resume)
    losses = {r["step"]: r["loss"] for r in trainer.state.log_history if "loss" in r}
    return losses, trainer.model


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_lora_autocast_and_checkpointing_resume_to_bit_equal_losses(tmp_path):
    losses, model = train(tmp_path)
    assert list(losses) == [1, 2, 3, 4, 5, 6]
    resumed, again = train(tmp_path, resume=str(tmp_path / "checkpoint-3"))
    assert {step: resumed[step] for step in (4, 5, 6)} == {s: losses[s] for s in (4, 5, 6)}
    state = again.state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(state[name], tensor), name
    changed = [
        name
        for name, parameter in model.named_parameters()
        if not torch.equal(parameter, dict(lora_model().named_parameters())[name])
    ]
    assert any("router" in name for name in changed)
    assert any("lora" in name and "experts" in name for name in changed)
    assert not any("base_layer" in name for name in changed)


@covers("25 LoRA")
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_lora_on_experts(dense, inputs):
    model = ecomoe.convert(dense, init="noise", **SETTINGS)
    want = run(model, inputs)
    layers = layers_of(model)
    # One parameter of each layer; peft takes names, dotted, from their end.
    names = [f"{n}.experts.down_proj.weight" for n, m in model.named_modules() if m in layers]
    tuned = peft.get_peft_model(
        model, peft.LoraConfig(r=2, target_modules=[], target_parameters=names)
    )
    trained = {name for name, p in tuned.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * len(layers)
    assert relative_error(run(tuned.eval(), inputs), want) < 1e-6
    gradients = step(tuned.train(), inputs)
    assert gradients.keys() == trained
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if name in trained:
                parameter.add_(0.1 * torch.randn_like(parameter))
    got = run(tuned.eval(), inputs)
    assert relative_error(got, want) > 1e-3
    merged = tuned.merge_and_unload()
    assert relative_error(run(merged, inputs), got) < 1e-5


@covers("25 quantisation")
@pytest.mark.filterwarnings("ignore:.*torch.ao.quantization.*:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor.*:UserWarning")
def test_dynamic_quantisation_leaves_layers_alone(dense, inputs):
    model = ecomoe.convert(dense, init="noise", **SETTINGS)
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    for layer, original in zip(layers_of(quantised), layers_of(model), strict=True):
        for name, tensor in original.state_dict().items():
            assert torch.equal(layer.state_dict()[name], tensor), name
    assert run(quantised, inputs).isfinite().all()


@covers("25 generate")
def test_generation(name):
    """Exact copies write what the dense model does; with noise a cache makes no difference."""
    model = build(name, auto=WRITERS[name])
    inputs = inputs_of(model)
    inputs.pop("decoder_input_ids", None)
    settings = {"do_sample": False, "max_new_tokens": 8, "min_new_tokens": 8, "pad_token_id": 0}
    if model.config.is_encoder_decoder:
        settings["decoder_start_token_id"] = 1
    want = model.generate(**inputs, **settings)
    noisy = ecomoe.convert(copy.deepcopy(model), init="noise", **SETTINGS)
    ecomoe.convert(model, **SETTINGS)
    for use_cache in (True, False):
        assert torch.equal(model.generate(**inputs, **settings, use_cache=use_cache), want)
    cached = noisy.generate(**inputs, **settings, use_cache=True)
    assert torch.equal(noisy.generate(**inputs, **settings, use_cache=False), cached)
    assert ecomoe.aux_loss(noisy) == 0
