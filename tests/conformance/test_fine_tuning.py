"""LoRA, bf16 autocast and non-reentrant checkpointing together in the Trainer, with resuming."""

import pytest
import torch
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
