"""What the ranks run in the tests of the monitor."""

import warnings

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
                monitor._watch.taps[0].layout = None
            model(batch(step, rank=distributed.get_rank())[0])
            monitor.step()
        hooks = sum(len(module._forward_hooks) for module in model.modules())
        monitor.close()
    steps = [point["step"] for point in monitor.report("train").to_dict()["trajectory"]]
    return [str(warning.message) for warning in told], steps, hooks > 0
