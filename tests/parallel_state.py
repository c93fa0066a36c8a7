"""States, copies and wrong use of a model on two ranks; see `test_distributed.py`."""

import copy
import pickle

import torch
from parallel import EVERY_LOSS, Case, Model, batch, build, mesh, whole
from torch import distributed, nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import parallelize_module
from torch.nn.parallel import DistributedDataParallel

import ecomoe
from ecomoe.distributed import (
    ExpertParallel,
    expert_parameters,
    parallelize_experts,
    reduce_losses,
)


def run_replication():
    """Ranks begin unlike each other; return whether all have the first rank's values after."""
    rank = distributed.get_rank()
    model = parallelize_experts(Model(seed=rank, **EVERY_LOSS).requires_grad_(False), mesh())
    first = Model(seed=0, **EVERY_LOSS)
    ours = {name: whole(value) for name, value in model.state_dict().items() if ".ffn." in name}
    return all(torch.equal(value, first.state_dict()[name]) for name, value in ours.items()) and (
        not any(parameter.requires_grad for parameter in model.parameters())
    )


def run_state_dict(folder):
    """Sharded to one process, one process to sharded, sharded to sharded through files."""
    alone = Model(seed=1)
    model = parallelize_experts(copy.deepcopy(alone), mesh())
    full = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    if distributed.get_rank() == 0:
        other = Model(seed=2)
        other.load_state_dict(full)
        assert same(other, alone)
    by_tensor = {name: whole(value) for name, value in model.state_dict().items()}
    Model(seed=2).load_state_dict(by_tensor)

    other = parallelize_experts(Model(seed=2), mesh())
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(other, alone.state_dict(), options=options)
    assert same(other, alone)

    checkpoint.save(model.state_dict(), checkpoint_id=folder)
    other = parallelize_experts(Model(seed=2), mesh())
    state = other.state_dict()
    checkpoint.load(state, checkpoint_id=folder)
    other.load_state_dict(state)
    assert same(other, alone)
    # A checkpoint of sharded experts is read by one process, too.
    state = Model(seed=2).state_dict()
    checkpoint.load(state, checkpoint_id=folder)
    return all(torch.equal(state[name], value) for name, value in alone.state_dict().items())


def same(model, expected):
    ours = {name: whole(value) for name, value in model.state_dict().items()}
    return all(torch.equal(ours[name], value) for name, value in expected.state_dict().items())


def run_copies():
    """Copy and pickle a model whose losses are reduced; return which copies still reduce them."""
    model = reduce_losses(build(Case()))
    (model(batch(Case())).mean() + ecomoe.aux_loss(model)).backward()
    found = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    sharded = copy.deepcopy(parallelize_experts(build(Case()), mesh()))
    (sharded(batch(Case())).mean() + ecomoe.aux_loss(sharded)).backward()
    return [other.blocks[0].moe.reduce_shares is not None for other in found]


def run_wrong_use():
    """Return the message of every refusal by name."""
    one = mesh()
    grid = init_device_mesh("cpu", (1, distributed.get_world_size()), mesh_dim_names=("dp", "ep"))
    uneven = nn.ModuleList([ecomoe.EcoMoE(8, 6, tiers=(4,)), ecomoe.EcoMoE(8, 6, tiers=(2, 1))])
    norm = ecomoe.EcoMoE(8, 6, tiers=(4,), hidden_norm=nn.BatchNorm1d(6))
    wrong = {
        "not a multiple": lambda: parallelize_experts(uneven, one),
        "twice": lambda: parallelize_experts(parallelize_experts(Model(), one), one),
        "two dimensions": lambda: parallelize_experts(Model(), grid),
        "no layer": lambda: parallelize_experts(nn.Linear(2, 2), one),
        "no style for it": lambda: parallelize_module(
            Model(), one, {"blocks.*.before": ExpertParallel()}
        ),
        "after DDP": lambda: parallelize_experts(DistributedDataParallel(Model()), one),
        "after FSDP": lambda: parallelize_experts(fully_shard(Model()), one),
        "batch norm": lambda: parallelize_experts(norm, one),
        "reduced twice": lambda: reduce_losses(reduce_losses(Model())),
        "no losses": lambda: reduce_losses(nn.Linear(2, 2)),
        "mesh of losses": lambda: reduce_losses(Model(), grid),
    }
    messages = {}
    for name, call in wrong.items():
        try:
            call()
        except ValueError as error:
            messages[name] = str(error)
    assert not expert_parameters(uneven), "a refused model must stay as it was"
    return messages
