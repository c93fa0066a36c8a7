"""LoRA on experts and router, bf16 autocast, checkpointing and resuming, all in one run."""

import pytest
import torch
from delivery import RecordingTrainer, texts, tiny_gpt2, trainer_for
from peft import LoraConfig, get_peft_model


def adapted():
    torch.manual_seed(0)
    config = LoraConfig(
        r=2,
        target_modules=[],
        target_parameters=["experts.up_proj.weight", "experts.down_proj.weight"],
        modules_to_save=["router"],
    )
    model = get_peft_model(tiny_gpt2({"warmup_fraction": 0.3}), config)
    model.enable_input_require_grads()
    return model


# The warning is peft's, which asks by the old name.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_resuming_gives_the_same_losses_to_the_bit(tmp_path):
    def run(resume=None):
        model = adapted()
        trainer = trainer_for(
            model,
            texts(24),
            RecordingTrainer,
            output_dir=str(tmp_path / "run"),
            gradient_accumulation_steps=2,
            learning_rate=1e-2,
            save_strategy="steps",
            save_steps=2,
            bf16=True,
            activation_checkpointing=True,
            activation_checkpointing_kwargs={"use_reentrant": False},
        )
        trainer.train(resume_from_checkpoint=resume)
        logs = [log for log in trainer.state.log_history if "loss" in log]
        return logs, trainer.recorder, model

    straight, recorder, model = run()
    resumed, again, model_again = run(str(tmp_path / "run" / "checkpoint-2"))
    assert resumed == straight
    assert [w.progress for w in again.windows] == [w.progress for w in recorder.windows][2:]
    assert again.logs == recorder.logs[2:]
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, model_again.get_parameter(name)), name
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert any("experts" in name for name in trained)
    assert any("router" in name for name in trained)
    assert all("lora" in name or "router" in name for name in trained)
