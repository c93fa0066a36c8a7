"""What the ranks run in the tests of the monitor."""

import json
import warnings
from contextlib import nullcontext

import torch
from torch import distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import ecomoe

STEPS = 3


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.moe = ecomoe.EcoMoE(8, 16, tiers=(2, 2))
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.moe(x))


def batch(step, *, rank):
    generator = torch.Generator().manual_seed(10 * step + rank)
    return torch.randn(20, 8, generator=generator), torch.arange(20) % 3


def watch(model, forward, ranks, log):
    """Count without learning, so that one process sees what two saw together."""
    with ecomoe.Monitor(model, every=2, log=log) as monitor:
        for step in range(STEPS):
            for rank in ranks:
                forward(batch(step, rank=rank)[0])
            monitor.step()
        model.eval()
        for rank in ranks:
            x, y = batch(9, rank=rank)
            with torch.no_grad():
                monitor.evaluate(outputs=forward(x), targets=y)
    latest = monitor.report("eval").to_dict(), monitor.report("train").to_dict()
    return [
        {
            "counts": record["layers"][0]["counts"],
            "accuracy": record["layers"][0]["accuracy"],
            "metrics": {k: round(v, 5) for k, v in record["metrics"].items()},
            "trajectory": record["trajectory"],
            "redundancy": record["layers"][0]["redundancy"],
        }
        for record in latest
    ]


def run_wrapped(how, log):
    """Return the last reports, and whether this rank wrote the file."""
    torch.manual_seed(0)
    model = Model()
    rank = distributed.get_rank()
    if how == "ddp":
        wrapped = DistributedDataParallel(model)
        found = watch(wrapped, wrapped, [rank], log)
    elif how == "ddp-inner":
        wrapped = DistributedDataParallel(model)
        found = watch(model, wrapped, [rank], log)
    else:
        fully_shard(model.moe)
        fully_shard(model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the wrapper, on views that a module returns
            found = watch(model, model, [rank], log)
    return found


def run_alone(log):
    torch.manual_seed(0)
    model = Model()
    return watch(model, model, [0, 1], log)


def run_failing():
    """One rank fails inside the block; the other must not wait for it."""
    model = Model()
    try:
        with ecomoe.Monitor(model, every=100):
            model(torch.randn(4, 8))
            raise RuntimeError("a rank fails")
    except RuntimeError:
        return True
    return False


def run_failing_on_the_first_alone():
    return run_failing() if distributed.get_rank() == 0 else True


def run_with_a_failing_monitor(at_close):
    """Watching fails on the first rank alone; return warnings, steps, and whether hooks stay."""
    torch.manual_seed(0)
    model = Model()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        monitor = ecomoe.Monitor(model, every=2, view="off")
        for step in range(7):
            if step == (6 if at_close else 3) and distributed.get_rank() == 0:
                monitor._watch.taps[0].layouts = None
            model(batch(step, rank=distributed.get_rank())[0])
            monitor.step()
        hooks = sum(len(module._forward_hooks) for module in model.modules())
        monitor.close()
    steps = [point["step"] for point in monitor.report("train").to_dict()["trajectory"]]
    return [str(warning.message) for warning in told], steps, hooks > 0


def run_evaluating_on_the_first_alone(log):
    """Train on both, evaluate on the first; return what each reports."""
    torch.manual_seed(0)
    model = Model()
    rank = distributed.get_rank()
    with ecomoe.Monitor(model, every=2, log=log, view="off", token_buckets=4) as monitor:
        for step in range(4):
            model(batch(step, rank=rank)[0])
            if step % 2 and rank == 0:
                x, y = batch(9, rank=0)
                model.eval()
                with torch.no_grad():
                    monitor.evaluate(outputs=model(x), targets=y, domains=y)
                model.train()
            monitor.step()
    return [monitor.report(phase).to_dict() for phase in ("eval", "train")]


def drift(model, step):
    with torch.no_grad():
        for parameter in model.moe.router.parameters():
            generator = torch.Generator().manual_seed(step)
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)


def run_resumed(log, stop, by_rank):
    """Stop behind an evaluation that is not reported yet, and go on in new monitors."""
    rank = distributed.get_rank()

    def run(steps, state=None):
        torch.manual_seed(0)
        model = Model()
        for step in range(steps[0]):
            drift(model, step)
        monitor = ecomoe.Monitor(model, every=3, log=log, view="off")
        if state is not None:
            monitor.load_state_dict(state)
        for step in steps:
            model(batch(step, rank=rank)[0])
            model.eval()
            x, y = batch(9, rank=rank)
            with torch.no_grad():
                monitor.evaluate(outputs=model(x), targets=y)
            drift(model, step)
            model.train()
            monitor.step()
        return monitor, model

    if stop is None:
        monitor, _ = run(range(9))
    else:
        monitor, _ = run(range(stop))
        # A checkpoint of each rank's own, or one that the first saves for all.
        state = monitor.state_dict() if by_rank else monitor._state(together=True)
        box = [state]
        if not by_rank:
            distributed.broadcast_object_list(box, src=0)
        monitor._detach(last_report=False)
        monitor, _ = run(range(stop, 9), json.loads(json.dumps(box[0])))
    monitor.close()
    return [monitor.report(phase).to_dict() for phase in ("eval", "train")]


def run_training(how, watched):
    """Train three steps; return the weights, what experts executed here, and the counts of all."""
    torch.manual_seed(0)
    model = Model()
    rank = distributed.get_rank()
    executed_E = torch.zeros(4, dtype=torch.int64)
    experts = model.moe.experts

    def count(module, args):
        executed_E.add_(args[1].expert_ids_S.bincount(minlength=4))

    hook = experts.register_forward_pre_hook(count)
    forward = model
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the wrapper, on views that a module returns
        if how == "ddp":
            forward = DistributedDataParallel(model)
        else:
            fully_shard(model.moe)
            fully_shard(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        given = {"optimizer": optimizer, "total_steps": STEPS, "every": 2, "view": "off"}
        schedule = ecomoe.schedule.Schedule(model, total_steps=STEPS) if not watched else None
        with ecomoe.Monitor(model, **given) if watched else nullcontext() as monitor:
            for step in range(STEPS):
                x, y = batch(step, rank=rank)
                loss = nn.functional.cross_entropy(forward(x), y) + ecomoe.aux_loss(model)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                if schedule is not None:
                    schedule.advance(step + 1)
    hook.remove()
    left = [h for m in model.modules() for h in m._forward_hooks.values() if "ecomoe" in repr(h)]
    weights = {
        name: (value.full_tensor() if hasattr(value, "full_tensor") else value).tolist()
        for name, value in model.state_dict().items()
    }
    distributed.all_reduce(executed_E)
    counts = None
    if watched:
        records = [r for r in monitor._recorder.records if r["phase"] == "train"]
        by_record = [r["layers"][0]["counts"]["topk"] for r in records]
        counts = [sum(column) for column in zip(*by_record, strict=True)]
    return weights, executed_E.tolist(), counts, len(left)
