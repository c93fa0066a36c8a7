"""What two ranks run beside one process that has all their tokens; see `test_distributed.py`."""

import copy
import warnings
from typing import NamedTuple

import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import parallelize_module
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint as recompute

import ecomoe
from ecomoe.distributed import (
    ExpertParallel,
    clip_grad_norm,
    expert_parameters,
    parallelize_experts,
    reduce_losses,
)
from ecomoe.multihop import MultiHop, halting
from ecomoe.relay import LossRelay
from ecomoe.routers import HashRouter

EVERY_LOSS = {
    "oracle_weight": 0.5,
    "balance_weight": 2.0,
    "ortho_weight": 0.3,
    "divergence_weight": 0.3,
    "z_weight": 0.1,
    "strength": 1.0,
}


class Block(nn.Module):
    def __init__(self, *, hops=None, **arguments):
        super().__init__()
        self.before = nn.Linear(8, 8)
        layer = ecomoe.EcoMoE(8, 6, tiers=(2, 1, 1), **arguments)
        self.ffn = MultiHop(layer, hops=hops, learned_scale=True) if hops else layer

    @property
    def moe(self):
        return self.ffn.layer if isinstance(self.ffn, MultiHop) else self.ffn

    def forward(self, x):
        return x + self.ffn(F.relu(self.before(x)))


class Model(nn.Module):
    def __init__(self, *, seed=0, **arguments):
        super().__init__()
        torch.manual_seed(seed)
        self.blocks = nn.ModuleList(Block(**arguments) for _ in range(2))
        self.head = nn.Linear(8, 3)
        self.checkpointing = None  # use_reentrant; None for off
        with torch.no_grad():
            for block in self.blocks:  # a router that has made up its mind, unlike a fresh one
                if hasattr(block.moe.router, "score"):
                    block.moe.router.score.weight.mul_(4.0)

    def forward(self, x):
        ids = (10 * x[:, 0]).long().abs()
        for block in self.blocks:
            if isinstance(block.moe.router, HashRouter):
                block.moe.router.tokens.ids = ids
            if self.checkpointing is None:
                x = block(x)
            else:
                x = recompute(block, x.requires_grad_(), use_reentrant=self.checkpointing)
        return self.head(x)


class Case(NamedTuple):
    arguments: dict = EVERY_LOSS
    tokens: tuple = (7, 7)  # on each rank
    relay: bool = False
    reduce: bool = True
    idle: tuple = ()  # experts that no token of any rank chooses
    checkpointing: bool | None = None
    dtype: torch.dtype = torch.float64


def batch(case, scale=1.0):
    """All ranks' tokens, those of different ranks unlike each other, and where they are split."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(sum(case.tokens), 8, generator=generator)
    x[: case.tokens[0]] += 0.5
    return (scale * x).to(case.dtype)


def build(case):
    model = Model(**case.arguments).to(case.dtype)
    with torch.no_grad():
        for block in model.blocks:
            if case.idle:
                block.moe.router.score.bias[list(case.idle)] = -1e4
    return model


def backward(case, model, x, *, num_tokens, factor=1.0):
    """Backpropagate the task loss of ``num_tokens`` tokens, and the auxiliary losses."""
    relay = LossRelay(getattr(model, "module", model)) if case.relay else None
    if relay:
        relay.watch(model)
    y = model(x)
    wide = torch.promote_types(y.dtype, torch.float32)
    loss = y.to(wide).square().sum() * (factor / num_tokens)
    if relay:
        relay.attach(loss)
    else:
        loss = loss + ecomoe.aux_loss(model)
    loss.backward()
    if relay:
        relay.close()
    return y.detach()


def relative(actual, expected):
    if isinstance(actual, DTensor):
        actual = actual.full_tensor()
    if expected is None:
        assert actual is None
        return 0.0
    scale = expected.abs().max().clamp_min(1e-3)
    error = (actual - expected).abs().max() / scale
    return error.nan_to_num(nan=torch.inf).item()  # a maximum may pass over a NaN


def compare(case, wrap, *, averaged=True):
    """Return the largest relative errors of outputs and gradients against one process."""
    rank = distributed.get_rank()
    alone = build(case)
    model = copy.deepcopy(alone)
    model.checkpointing = case.checkpointing
    model = wrap(model)
    if case.reduce:
        reduce_losses(model)
    x = batch(case)
    mine = x.split(case.tokens)[rank]
    y = backward(case, model, mine, num_tokens=len(x), factor=distributed.get_world_size())
    if not averaged:
        average(model)
    y_alone = backward(case, alone, x, num_tokens=len(x))
    errors = {"output": relative(y, y_alone.split(case.tokens)[rank])} if len(mine) else {}
    for (name, ours), theirs in zip(model.named_parameters(), alone.parameters(), strict=True):
        assert ours.grad is not None, name
        errors[name] = relative(ours.grad, theirs.grad)
    return max(errors.values())


def average(model):
    """Average over ranks what expert parallelism replicates, as DDP would."""
    sharded = set(expert_parameters(model))
    for parameter in model.parameters():
        if parameter not in sharded and parameter.grad is not None:
            distributed.all_reduce(parameter.grad)
            parameter.grad /= distributed.get_world_size()


def mesh():
    return init_device_mesh("cpu", (distributed.get_world_size(),), mesh_dim_names=("ep",))


def shard_units(model, how, **options):
    for block in model.blocks:
        if how == "layers":
            # torch warns of a layer's output, which is a view; nothing here changes it in place.
            warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
            fully_shard(block.moe, **options)
        elif how == "experts":
            fully_shard(block.moe.experts, **options)
            register_fsdp_forward_method(block.moe.experts, "all_outputs")
        elif how == "routers":
            fully_shard(block.moe.router, **options)
        if how in ("blocks", "routers", "experts"):
            fully_shard(block, **options)
    return fully_shard(model, **options)


def run_ddp(case, options):
    return compare(case, lambda model: DistributedDataParallel(model, **options))


def run_fsdp(case, how, options):
    return compare(case, lambda model: shard_units(model, how, **options))


def run_experts(case, how):
    def wrap(model):
        model = parallelize_experts(model, mesh())
        if how == "ddp":
            return DistributedDataParallel(model)
        if how == "fsdp":
            ignored = set(expert_parameters(model))
            for block in model.blocks:
                fully_shard(block, mesh=mesh(), ignored_params=ignored)
            return fully_shard(model, mesh=mesh(), ignored_params=ignored)
        return model

    return compare(case, wrap, averaged=how is not None)


def run_grid(case):
    """Experts sharded over one dimension of a 2 x 2 mesh and replicated over the other."""

    def wrap(model):
        grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "ep"))
        parallelize_experts(model, grid["ep"])
        everyone = init_device_mesh("cpu", (4,))
        for block in model.blocks:
            fully_shard(block.moe.experts, mesh=grid["dp"])
            fully_shard(block, mesh=everyone)
        return fully_shard(model, mesh=everyone)

    return compare(case, wrap)


def run_steps(how):
    """Optimizer steps beside one process; a static graph, for one, is fixed after the first."""
    case = Case()
    alone = build(case)
    model = copy.deepcopy(alone)
    if how == "experts":
        model = parallelize_experts(model, mesh())
    if how == "fsdp":
        model = shard_units(model, "blocks")
    else:
        model = DistributedDataParallel(model, static_graph=how == "static")
    reduce_losses(model)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-3) for m in (model, alone)]
    for step in range(3):
        x = batch(case, scale=1.0 + step)
        mine = x.split(case.tokens)[distributed.get_rank()]
        for optimizer in optimizers:
            optimizer.zero_grad()
        backward(case, model, mine, num_tokens=len(x), factor=distributed.get_world_size())
        backward(case, alone, x, num_tokens=len(x))
        for optimizer in optimizers:
            optimizer.step()
    pairs = zip(model.parameters(), alone.parameters(), strict=True)
    return max(relative(ours.detach(), theirs.detach()) for ours, theirs in pairs)


def run_clipping(how):
    """Clip to half the norm; return the errors of the norm and of the gradients after."""
    case = Case()
    alone = build(case)
    model = parallelize_experts(copy.deepcopy(alone), mesh())
    if how == "fsdp":
        fully_shard(model, ignored_params=set(expert_parameters(model)))
    else:
        model = DistributedDataParallel(model)
    reduce_losses(model)
    x = batch(case)
    mine = x.split(case.tokens)[distributed.get_rank()]
    backward(case, model, mine, num_tokens=len(x), factor=distributed.get_world_size())
    backward(case, alone, x, num_tokens=len(x))
    half = 0.5 * nn.utils.get_total_norm(p.grad for p in alone.parameters()).item()
    expected = nn.utils.clip_grad_norm_(alone.parameters(), half)
    errors = [relative(clip_grad_norm(model, half), expected)]
    for ours, theirs in zip(model.parameters(), alone.parameters(), strict=True):
        errors.append(relative(ours.grad, theirs.grad))
    return max(errors)


def run_fsdp_alone(how, zero_output):
    """Backpropagate auxiliary losses alone; return torch's or our complaint, or the error."""
    model = shard_units(build(Case()), how)
    y = model(batch(Case()))
    loss = ecomoe.aux_loss(model)
    if zero_output:
        loss = loss + 0.0 * y.sum()
    try:
        loss.backward()
    except ValueError as error:
        return str(error)
    alone = build(Case())
    alone(batch(Case()))
    ecomoe.aux_loss(alone).backward()
    pairs = zip(model.parameters(), alone.parameters(), strict=True)
    return max(
        relative(ours.grad, theirs.grad) for ours, theirs in pairs if theirs.grad is not None
    )


def run_mixed_precision():
    """Routers that are units of their own, in fp32, inside a model that computes in bf16."""
    case = Case(dtype=torch.float32)
    model = build(case)
    seen = {}
    for block in model.blocks:
        fully_shard(block.moe.router)
        fully_shard(block, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
        block.moe.router.register_forward_hook(
            lambda router, args, routing: seen.update(
                router=router.score.weight.dtype, logits=routing.logits_NE.dtype
            )
        )
        block.moe.experts.register_forward_hook(lambda *hook: seen.update(experts=hook[-1].dtype))
    fully_shard(model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    y = model(batch(case))
    (y.square().mean() + ecomoe.aux_loss(model)).backward()
    return seen


def run_layer(arguments, classes, tokens):
    """One layer of any kind, experts sharded, beside one process; return the largest error."""
    rank = distributed.get_rank()
    alone = ecomoe.EcoMoE(8, tiers=(2, 1, 1), **arguments).double()
    layer = copy.deepcopy(alone)
    parallelize_module(layer, mesh(), ExpertParallel())
    reduce_losses(layer)
    x = batch(Case(tokens=tokens))
    targets = torch.arange(len(x)) % (classes or 1)

    def gradient_of_mean(module, x, targets, factor):
        x = x.clone().requires_grad_()
        y = module(x, targets=targets if classes else None)
        (y.square().sum() * (factor / len(targets_all)) + ecomoe.aux_loss(module)).backward()
        return y.detach(), x.grad / factor

    targets_all = targets
    size = distributed.get_world_size()
    ours = gradient_of_mean(layer, x.split(tokens)[rank], targets.split(tokens)[rank], size)
    theirs = gradient_of_mean(alone, x, targets, 1)
    average(layer)
    pairs = [(our, their.split(tokens)[rank]) for our, their in zip(ours, theirs, strict=True)]
    for our, their in zip(layer.parameters(), alone.parameters(), strict=True):
        if their.requires_grad:
            pairs.append((our.grad, their.grad))
    return max(relative(our, their) for our, their in pairs if our.numel())


def run_evaluation():
    """Return what a hook on sharded experts sees, and the outputs' error, without gradients."""
    alone = build(Case()).eval()
    model = parallelize_experts(copy.deepcopy(alone), mesh())
    seen = {}

    def hook(experts, args, y_SF):
        x_SD, plan = args
        seen.update(x=tuple(x_SD.shape), y=tuple(y_SF.shape), ends=tuple(plan.ends_E.shape))

    model.blocks[0].moe.experts.register_forward_hook(hook)
    x = batch(Case())[3 * distributed.get_rank() :][:5]
    with torch.no_grad():
        return seen, relative(model(x), alone(x))


def run_halting(case, how, epsilon):
    """Halt tokens on ranks that have different ones; return the error, our tokens and all."""
    alone = build(case).eval()
    model = copy.deepcopy(alone)
    if how == "experts":
        model = parallelize_experts(model, mesh())
    elif how == "fsdp":
        model = shard_units(model, "blocks")
    else:
        model = DistributedDataParallel(model)
    model.eval()
    x = batch(case)
    mine = x.split(case.tokens)[distributed.get_rank()]
    with torch.no_grad():
        with halting(model, epsilon=epsilon) as saved:
            y = model(mine)
        with halting(alone, epsilon=epsilon) as alone_saved:
            y_alone = alone(x).split(case.tokens)[distributed.get_rank()]
    ours, theirs = ([h.tokens for h in s.layers.values()] for s in (saved, alone_saved))
    return relative(y, y_alone) if len(mine) else 0.0, ours, theirs


def whole(value):
    return value.full_tensor() if isinstance(value, DTensor) else value


def run_compiled(how):
    """Compile into one graph; return the largest error of the gradients against eager."""
    warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
    eager = build(Case())
    if how == "experts":
        parallelize_experts(eager, mesh())
    reduce_losses(eager)
    model = copy.deepcopy(eager)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    errors = []
    for tokens in ((7, 7), (4, 9)):
        x = batch(Case(tokens=tokens)).split(tokens)[distributed.get_rank()]
        relay = LossRelay(model)
        relay.watch(compiled)
        loss = compiled(x).square().mean()
        relay.attach(loss)
        loss.backward()
        relay.close()
        (eager(x).square().mean() + ecomoe.aux_loss(eager)).backward()
        pairs = zip(model.parameters(), eager.parameters(), strict=True)
        errors += [relative(ours.grad, whole(theirs.grad)) for ours, theirs in pairs]
    return max(errors)
