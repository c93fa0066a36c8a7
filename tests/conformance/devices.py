"""A converted model on two ranks beside the same model in one process; see `test_devices.py`."""

import copy
import warnings

import matrix
from matrix import SETTINGS, inputs_of, layers_of, task_loss, without_dropout
from parallel import average, mesh, relative
from torch import distributed
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import ecomoe
from ecomoe.distributed import parallelize_experts, reduce_losses
from ecomoe.relay import LossRelay

BATCH = 4
DDP = {
    "ddp": {},
    "ddp, unused parameters": {"find_unused_parameters": True},
    "ddp, static graph": {"static_graph": True},
}
WAYS = [*DDP, "fsdp, one unit", "fsdp, a unit a layer", "experts"]


def build(name):
    model = ecomoe.convert(matrix.build(name), init="noise", strength=1.0, **SETTINGS).train()
    without_dropout(model)
    return model


def wrap(model, way):
    if way in DDP:
        return DistributedDataParallel(model, **DDP[way])
    if way == "experts":
        return parallelize_experts(model, mesh())
    if way == "fsdp, a unit a layer":
        for layer in layers_of(model):
            fully_shard(layer)
    return fully_shard(model)


def backward(model, inputs, *, relay):
    """Backpropagate a loss of a model's first output, and the auxiliary losses."""
    with warnings.catch_warnings():
        # A layer that is a unit of FSDP returns a view; nothing changes it in place. And DDP says
        # that a depthwise convolution's gradient has strides of its own.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module|Grad strides do not match")
        if not relay:
            (task_loss(model, inputs) + ecomoe.aux_loss(model)).backward()
            return
        relay = LossRelay(model)
        relay.watch(model)
        loss = task_loss(model, inputs)
        relay.attach(loss)
        loss.backward()
        relay.close()


def compare(name, way, relay):
    """Return the largest relative error of a gradient."""
    alone = build(name)
    inputs = inputs_of(alone, batch=BATCH)
    model = reduce_losses(copy.deepcopy(alone))
    backward(alone, inputs, relay=False)
    model = wrap(model, way)
    rank, share = distributed.get_rank(), BATCH // distributed.get_world_size()
    mine = {key: value[rank * share :][:share] for key, value in inputs.items()}
    backward(model, mine, relay=relay)
    if way == "experts":
        average(model)
    pairs = zip(model.parameters(), alone.parameters(), strict=True)
    return max(relative(o.grad, t.grad) for o, t in pairs if t.grad is not None)
