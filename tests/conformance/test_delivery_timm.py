"""In timm's tasks, and in its script, the auxiliary gradient is that of one big batch, too."""

import copy
import gc
import math
import sys
from textwrap import dedent

import pytest
import timm
import timm.scheduler
import timm.task
import torch
from delivery import LINEAR, relative_error, router_gradient
from timm.utils import NativeScaler
from torch import nn

import ecomoe
from ecomoe.ecology.sinks import read_records
from ecomoe.integrations import timm_training
from ecomoe.integrations.timm_training import TaskSession, convert_settings, final_loss, main

CLASSES = 4


def vit(**arguments) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=16,
        patch_size=8,
        embed_dim=32,
        depth=2,
        num_heads=2,
        num_classes=CLASSES,
        **arguments,
    )
    nn.init.normal_(model.head.weight, std=0.1)
    for block in model.blocks:
        block.mlp = ecomoe.EcoMoE(32, 64, tiers=(2, 2), temperature=2.0, **LINEAR)
    return model.train()


def images(count, size=2):
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(size, 3, 16, 16, generator=generator),
            torch.randint(CLASSES, (size,), generator=generator),
        )
        for _ in range(count)
    ]


def classification(model):
    return timm.task.ClassificationTask(model, nn.CrossEntropyLoss(), verbose=False)


def distillation(model):
    return timm.task.LogitDistillationTask(
        model, vit(), nn.CrossEntropyLoss(), distill_loss_weight=0.5, verbose=False
    )


def features(model):
    return timm.task.FeatureDistillationTask(
        model, vit(), nn.CrossEntropyLoss(), distill_loss_weight=0.5, verbose=False
    )


def reference(task, data, *, progress=0.0):
    model = task.get_trainable_module()
    for layer in layers(model):
        layer.set_progress(progress)
    model.zero_grad()
    input, target = (torch.cat(column) for column in zip(*data, strict=True))
    (task(input, target)["loss"] + ecomoe.aux_loss(model)).backward()
    return router_gradient(model)


def layers(model):
    return [module for module in model.modules() if isinstance(module, ecomoe.EcoMoE)]


TASKS = {"classification": classification, "logits": distillation, "features": features}


@pytest.mark.parametrize("kind", TASKS)
@pytest.mark.parametrize("steps", [1, 4])
def test_router_gradient_in_a_task(kind, steps):
    data = images(steps)
    task = TASKS[kind](vit())
    optimizer = torch.optim.SGD(task.get_trainable_module().parameters(), lr=0.0)
    with TaskSession(task, optimizer=optimizer, total_steps=10):
        for input, target in data:
            loss = task(input, target)["loss"]
            loss /= steps  # in place, as timm's script does
            loss.backward()
        gradient = router_gradient(task.get_trainable_module())
    assert relative_error(gradient, reference(TASKS[kind](vit()), data)) < 1e-5


def test_a_session_that_nobody_holds_any_more_is_closed():
    task = classification(vit())
    model = task.get_trainable_module()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    monitor = ecomoe.Monitor(view="off")
    session = TaskSession(task, optimizer=optimizer, total_steps=10, monitor=monitor)
    task(*images(1)[0])["loss"].backward()
    assert all(layer.auxiliary.relay for layer in layers(model))
    del session
    gc.collect()
    assert not any(layer.auxiliary.relay for layer in layers(model))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in task.modules())
    assert not optimizer._optimizer_step_post_hooks
    TaskSession(task, optimizer=optimizer, total_steps=10).close()


def test_a_batch_that_is_skipped_is_in_no_gradient_and_no_log():
    data = images(2)
    task = classification(vit())
    model = task.get_trainable_module()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with TaskSession(task, optimizer=optimizer, total_steps=10) as session:
        for input, target in (data[0], (data[1][0] * float("nan"), data[1][1]), data[1]):
            loss = task(input, target)["loss"] / 2
            if loss.isfinite():
                loss.backward()
        gradient = router_gradient(model)
        logs = session.auxiliary_logs()
    assert relative_error(gradient, reference(classification(vit()), data)) < 1e-5
    assert all(math.isfinite(value) for value in logs.values())


def test_router_gradient_with_a_loss_scaler():
    data = images(2)
    task = classification(vit())
    model = task.get_trainable_module()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    scaler = NativeScaler(device="cpu")
    with TaskSession(task, optimizer=optimizer, total_steps=10) as session:
        for index, (input, target) in enumerate(data):
            scaler(
                task(input, target)["loss"] / 2,
                optimizer,
                parameters=model.parameters(),
                clip_grad=1e9,  # has the scaler take the scale out again
                need_update=index == 1,
            )
        assert session.schedule.step == 1
    assert relative_error(router_gradient(model), reference(classification(vit()), data)) < 1e-5


def test_router_gradient_with_a_criterion_outside_the_model():
    data = images(3)
    model, criterion = vit(), nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with TaskSession(criterion, model=model, optimizer=optimizer, total_steps=10):
        for input, target in data:
            (criterion(model(input), target) / 3).backward()
    assert relative_error(router_gradient(model), reference(classification(vit()), data)) < 1e-5


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch's
def test_router_gradient_in_a_compiled_task():
    data = images(2)
    task = classification(vit())
    optimizer = torch.optim.SGD(task.get_trainable_module().parameters(), lr=0.0)
    task.compile(backend="aot_eager")
    with TaskSession(task, optimizer=optimizer, total_steps=10):
        for input, target in data:
            (task(input, target)["loss"] / 2).backward()
    gradient = router_gradient(task.get_trainable_module())
    assert relative_error(gradient, reference(classification(vit()), data)) < 1e-5


def test_a_copy_for_averaging_stays_out_of_the_run():
    task = classification(vit())
    optimizer = torch.optim.SGD(task.get_trainable_module().parameters(), lr=0.1)
    monitor = ecomoe.Monitor(view="off")
    with TaskSession(task, optimizer=optimizer, total_steps=10, monitor=monitor):
        (input, target), *_ = images(1)
        task(input, target)["loss"].backward()
        optimizer.step()
        task.setup_ema()
        task.update_ema(step=1)
        average = task.get_trainable_module(ema=True)
        assert not any(layer.auxiliary.relay for layer in layers(average))
        average(input)
        copy.deepcopy(task)


def test_nothing_is_left_behind():
    task = classification(vit())
    optimizer = torch.optim.SGD(task.get_trainable_module().parameters(), lr=0.1)
    monitor = ecomoe.Monitor(view="off")
    with (
        pytest.raises(KeyError),
        TaskSession(task, optimizer=optimizer, total_steps=10, monitor=monitor) as session,
    ):
        raise KeyError
    session.close()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in task.modules())
    assert not optimizer._optimizer_step_post_hooks
    assert not any(layer.auxiliary.relay for layer in layers(task))


def test_schedule_and_monitor_follow_the_optimizer():
    task = classification(vit())
    optimizer = torch.optim.SGD(task.get_trainable_module().parameters(), lr=0.1)
    monitor = ecomoe.Monitor(view="off", every=2)
    with TaskSession(task, optimizer=optimizer, total_steps=4, monitor=monitor) as session:
        for step, (input, target) in enumerate(images(4)):
            assert session.schedule.step == monitor.step_count == step
            task(input, target)["loss"].backward()
            optimizer.step()
        logs = session.auxiliary_logs()
        layer = layers(task)[0]
        assert layer.temperature.item() == pytest.approx(layer.control.temperature_at(1.0))
    assert {"aux_oracle", "aux_z", "aux_total"} <= set(logs)
    assert monitor.report().to_dict()["step"] == 4


def test_a_lost_loss_is_told():
    task = classification(vit())
    optimizer = torch.optim.SGD(task.get_trainable_module().parameters(), lr=0.1)
    (input, target), *_ = images(1)
    with TaskSession(task, optimizer=optimizer, total_steps=4):
        copy.deepcopy(task)(input, target)["loss"].backward()
        with pytest.warns(UserWarning, match="did not reach the gradient.*call the task"):
            optimizer.step()


@pytest.mark.parametrize("output", [None, {}, {"output": torch.ones(1)}, (), "loss", {"loss": 1.0}])
def test_an_output_without_a_loss(output):
    with pytest.raises(ValueError, match="it must return a tensor, a dict with 'loss' or a tuple"):
        final_loss(output)


def test_a_task_that_is_no_module():
    model = vit()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"must be an nn\.Module .*wrap a function in a module"):
        TaskSession(lambda x: x, model=model, optimizer=optimizer, total_steps=1)
    assert not optimizer._optimizer_step_post_hooks


SCRIPT = """
    import sys
    import torch
    from timm.models import create_model
    from timm import utils
    from timm.optim import create_optimizer_v2
    from timm.scheduler import create_scheduler_v2
    from timm.task import {task}

    assert __name__ == "__main__"
    start_epoch = int(sys.argv[1])
    torch.manual_seed(0)
    model = create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=8, embed_dim=32, depth=2, num_heads=2,
        num_classes=4,
    )
    task = {task}(model, torch.nn.CrossEntropyLoss(), verbose=False)
    model = task.get_trainable_module()
    optimizer = create_optimizer_v2(model, opt="sgd", lr=0.1)
    task.setup_ema()
    scheduler, num_epochs = create_scheduler_v2(
        optimizer, sched="cosine", num_epochs=2, warmup_epochs=0, updates_per_epoch=3
    )
    if start_epoch:
        scheduler.step(start_epoch)
    for epoch in range(start_epoch, num_epochs):
        for update in range(3):
            print("T", round(model.blocks[0].mlp.temperature.item(), 4))
            task(torch.randn(2, 3, 16, 16), torch.randint(4, (2,)))["loss"].backward()
            optimizer.step()
            optimizer.zero_grad()
            task.update_ema()
            scheduler.step_update(epoch * 3 + update + 1)
        model.eval()
        with torch.inference_mode():
            target = torch.randint(4, (4,))
            utils.accuracy(model(torch.randn(4, 3, 16, 16)), target, topk=(1, 2))
            evaluator = task.create_evaluator()
            evaluator.update(model(torch.randn(4, 3, 16, 16)), target)
        model.train()
        scheduler.step(epoch + 1, 0.5)
"""


def run_script(tmp_path, *options, start_epoch=0, task="ClassificationTask"):
    script = tmp_path / "train.py"
    script.write_text(dedent(SCRIPT).format(task=task))
    main([*options, str(script), str(start_epoch)])


def names():
    return [
        timm.create_model,
        timm.models.create_model,
        timm.scheduler.create_scheduler_v2,
        timm.utils.accuracy,
        timm.task.TrainingTask.__init__,
        sys.argv,
        list(sys.path),
    ]


def test_script_runs_unmodified(tmp_path, capsys):
    before = names()
    records = tmp_path / "run.jsonl"
    run_script(
        tmp_path, "--tiers", "2,2", "--set", "layers=0", "--log", str(records), "--every", "3"
    )
    assert names() == before
    out = capsys.readouterr().out
    temperatures = [float(line[2:]) for line in out.splitlines() if line.startswith("T ")]
    control = ecomoe.Control.from_target(0.545)
    expected = [control.temperature_at(step / 6) for step in range(6)]
    assert temperatures == pytest.approx(expected, abs=1e-4)
    assert "1 of 2 feed-forward blocks replaced" in out
    assert "step 6" in out
    lines = list(read_records(records))
    assert [line["step"] for line in lines if line["phase"] == "train"] == [3, 6]
    judged = [line for line in lines if line["phase"] == "eval"]
    assert all(line["layers"][0]["accuracy"] is not None for line in judged)
    assert len(judged) == 2


def test_script_resumes_at_its_own_count_of_updates(tmp_path, capsys):
    run_script(tmp_path, "--tiers", "2,2", start_epoch=1)
    lines = capsys.readouterr().out.splitlines()
    temperatures = [float(line[2:]) for line in lines if line.startswith("T ")]
    control = ecomoe.Control.from_target(0.545)
    expected = [control.temperature_at(step / 6) for step in (3, 4, 5)]
    assert temperatures == pytest.approx(expected, abs=1e-4)


def test_a_failing_script_leaves_nothing(tmp_path):
    before = names()
    with pytest.raises(ImportError):
        run_script(tmp_path, task="NoSuchTask")
    assert names() == before


def test_a_script_without_a_task_is_told(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(
        dedent("""
            import torch
            from timm.scheduler import create_scheduler_v2
            optimizer = torch.optim.SGD([torch.ones(1, requires_grad=True)], lr=0.1)
            create_scheduler_v2(optimizer, updates_per_epoch=3)
        """)
    )
    with pytest.raises(ValueError, match=r"without a timm\.task\.TrainingTask.*use .*TaskSession"):
        main([str(script)])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "strength", "train.py"], "must be NAME=VALUE"),
        (["--set", "width=3", "train.py"], "with an argument of ecomoe.convert: target_e, tiers"),
        (["--tiers", "8;4", "train.py"], "--tiers 8;4 must be"),
        (["--every", "0", "train.py"], "every=0 must be an int >= 1"),
        ([], "required: script"),
    ],
)
def test_wrong_options(arguments, message, capsys):
    with pytest.raises(SystemExit):
        main(arguments)
    assert message in capsys.readouterr().err


def test_settings():
    assert convert_settings(["init=noise", "oracle_weight=0.1", "tiers=(2, 2)"]) == {
        "init": "noise",
        "oracle_weight": 0.1,
        "tiers": (2, 2),
    }


def test_importing_does_not_need_timm():
    assert "timm" not in vars(timm_training)
