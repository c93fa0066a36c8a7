"""More than one device: expert parallelism and losses over ranks, on torch.distributed itself.

Every rank has tokens of its own, and the loss that all of them train is the *mean over ranks* of
their losses. DDP and FSDP compute that mean's gradient for what each rank holds in full (routers,
norms, attention); the shards of this module have it by themselves.

- `parallelize_experts` shards the stacked experts over ranks. Tokens travel to their experts and
  back by two exchanges of uneven size, one more brings the sizes.
- `reduce_losses` makes the auxiliary losses those of all ranks' tokens taken together.

Axes: N tokens, D input features, F output features, E experts, S slots sorted by expert, R ranks of
the expert-parallel mesh, L = E / R experts of a rank, P slots that a rank receives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import torch
from torch import Tensor, distributed, nn
from torch.distributed import ProcessGroup
from torch.distributed import _functional_collectives as collectives
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from ecomoe.dispatch import Plan, plan_dispatch, scatter_to_experts, unsort_slots
from ecomoe.experts import ExpertLinear, Experts, FFNExperts, HeadExperts
from ecomoe.losses import Means
from ecomoe.moe import EcoMoE

# --- expert parallelism -------------------------------------------------------------------------


class ExpertParallel(ParallelStyle):
    """Shards the experts of an `EcoMoE` layer over a mesh; a style for `parallelize_module`.

    The stacked weights and biases become DTensors, ``Shard(0)``: rank r of R holds the experts
    from ``r * E / R`` on. All else (router, prototypes, a norm among the experts) is replicated,
    with the values of the mesh's first rank; keeping the replicas equal is DDP's or FSDP's work.
    With ``parallelize_module(..., src_data_rank=None)`` nothing is sent, and ranks must agree.

    Outputs and gradients are those of one process that holds all experts. A call is a collective:
    ranks must call a layer equally often, with any number of tokens, none included, and all in
    training or all not; and the gradient must come back through its output on all or none.

    Use `parallelize_experts` for a whole model; it also tells DDP what not to average.

    Raises:
        ValueError: The module is no `EcoMoE` layer, is parallel already, or does not fit the mesh.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        layer = _check_shardable(module, device_mesh, name=type(module).__name__)
        own = {
            parameter
            for linear in _expert_linears(layer)
            for parameter in linear.parameters(recurse=False)
        }
        if self.src_data_rank is not None:
            group = device_mesh.get_group()
            for tensor in (*layer.parameters(), *layer.buffers()):
                if tensor not in own and not tensor.is_meta:
                    distributed.broadcast(
                        tensor.detach(), group=group, group_src=self.src_data_rank
                    )
        for linear in _expert_linears(layer):
            for name, parameter in list(linear.named_parameters(recurse=False)):
                shard = distribute_tensor(
                    parameter.detach(), device_mesh, [Shard(0)], src_data_rank=self.src_data_rank
                )
                linear.register_parameter(
                    name, nn.Parameter(shard, requires_grad=parameter.requires_grad)
                )
            linear.__class__ = ShardedExpertLinear
        layer.experts.__class__ = _PARALLEL[type(layer.experts)]
        return layer


def parallelize_experts(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Shard the experts of every `EcoMoE` layer of ``model`` over the ranks of ``mesh``, in place.

    Call it before `DistributedDataParallel` or ``fully_shard``, and before the optimizer is made:
    the experts' parameters are new ones. Where the mesh spans all ranks, DDP is told to leave
    them alone, and ``fully_shard`` is to be told the same by
    ``ignored_params=set(expert_parameters(model))``. On a mesh with a data-parallel dimension
    besides, use ``fully_shard(layer.experts, mesh=mesh["dp"])``.

    Args:
        model: Any module that contains layers, or a layer itself.
        mesh: One dimension; its size must divide the number of experts of each layer.

    Returns:
        The model.

    Raises:
        ValueError: There is no layer, or one does not fit; nothing has been changed then.
    """
    if isinstance(model, DistributedDataParallel):
        raise ValueError(
            "model=DistributedDataParallel already holds the experts' parameters to average; shard "
            "first: DistributedDataParallel(parallelize_experts(model, mesh))"
        )
    layers = list(_layers(model))
    for name, layer in layers:
        _check_shardable(layer, mesh, name=name)
    for _, layer in layers:
        parallelize_module(layer, mesh, ExpertParallel())
    if mesh.size() == distributed.get_world_size():
        shards = set(expert_parameters(model))
        names = [name for name, parameter in model.named_parameters() if parameter in shards]
        known = getattr(model, "_ddp_params_and_buffers_to_ignore", ())
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, [*known, *names])
    return model


def expert_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters of ``model`` that expert parallelism sharded; empty if none is."""
    return [
        parameter
        for module in model.modules()
        if isinstance(module, ShardedExpertLinear)
        for parameter in module.parameters(recurse=False)
    ]


def clip_grad_norm(model: nn.Module, max_norm: float) -> Tensor:
    """Scale the gradients of ``model`` so that their common norm is at most ``max_norm``.

    As `torch.nn.utils.clip_grad_norm_`, which takes either plain parameters or those of one mesh:
    here every gradient counts once, sharded experts on whichever rank they are.

    Args:
        model: Any module, after ``backward()``; its replicated gradients must have been averaged.
        max_norm: The largest norm allowed, 2-norm, > 0.

    Returns:
        The norm before, a scalar.
    """
    groups: dict[DeviceMesh | None, list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.grad is not None:
            mesh = parameter.grad.device_mesh if isinstance(parameter.grad, DTensor) else None
            groups.setdefault(mesh, []).append(parameter)
    norms = []
    for parameters in groups.values():
        norm = nn.utils.get_total_norm(p.grad for p in parameters if p.grad is not None)
        norms.append(norm.full_tensor() if isinstance(norm, DTensor) else norm)
    total = torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros(())
    for parameters in groups.values():
        nn.utils.clip_grads_with_norm_(parameters, max_norm, total)
    return total


class ShardedExpertLinear(ExpertLinear):
    """An `ExpertLinear` of which each rank computes its own experts; made by `ExpertParallel`."""

    def operands(self) -> tuple[Tensor, Tensor | None]:
        """Return this rank's weight (L, F, D) and bias (L, F)."""
        return _own_shard(self.weight), None if self.bias is None else _own_shard(self.bias)


class ParallelExperts(Experts):
    """Experts of which each rank holds some: slots travel to them and their outputs back.

    Seen from outside, and by hooks, nothing differs from experts that are all here.

    The sizes of the exchange must be known on the host: each call waits for the device once. It is
    the one place where the layer does. The alternative, buffers of a fixed size, would have to
    drop tokens or to send R times as much.
    """

    def forward(self, x_SD: Tensor, plan: Plan) -> Tensor:
        """Return each slot's output of its own expert, wherever that is, ``(S, F)``."""
        mesh = self._mesh()
        group, num_ranks = mesh.get_group(), mesh.size()
        num_local = self.num_experts // num_ranks

        counts_E = torch.diff(plan.ends_E, prepend=plan.ends_E.new_zeros(1)).long()
        arriving_E = _exchange(counts_E, None, None, group)  # (ranks, experts of this one), flat
        sizes = torch.stack((counts_E, arriving_E)).view(2, num_ranks, num_local).sum(-1)
        sent, received = sizes.tolist()

        x_PD = _exchange(x_SD, received, sent, group)
        # They arrive by rank, then by expert: sorted again they stand as one process has them.
        experts_E = torch.arange(num_local, device=x_SD.device).repeat(num_ranks)
        ids_P = experts_E.repeat_interleave(arriving_E, output_size=sum(received))
        local = plan_dispatch(ids_P, num_experts=num_local)
        y_PF = super().forward(scatter_to_experts(x_PD, local, top_k=1), local)
        y_PF = unsort_slots(y_PF, local, top_k=1).squeeze(1)
        return _exchange(y_PF, sent, received, group)

    def _mesh(self) -> DeviceMesh:
        weight = next(m.weight for m in self.modules() if isinstance(m, ShardedExpertLinear))
        assert isinstance(weight, DTensor)
        return weight.device_mesh


class ParallelFFNExperts(ParallelExperts, FFNExperts):
    """`FFNExperts` over ranks."""


class ParallelHeadExperts(ParallelExperts, HeadExperts):
    """`HeadExperts` over ranks."""


_PARALLEL: dict[type[Experts], type[ParallelExperts]] = {
    FFNExperts: ParallelFFNExperts,
    HeadExperts: ParallelHeadExperts,
}


class _ScaleGradient(torch.autograd.Function):
    """Identity whose gradient is multiplied by a number."""

    @staticmethod
    def forward(ctx, x, factor):  # type: ignore[no-untyped-def]
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        return grad * ctx.factor, None


def _own_shard(parameter: Tensor) -> Tensor:
    """Return this rank's part; its gradient, a sum over the mesh's losses, becomes their mean."""
    assert isinstance(parameter, DTensor)
    own: Tensor = _ScaleGradient.apply(parameter.to_local(), 1.0 / parameter.device_mesh.size())
    return own


def _exchange(
    rows: Tensor, received: list[int] | None, sent: list[int] | None, group: ProcessGroup
) -> Tensor:
    """Send rows to ranks, ``sent[r]`` to rank r; the gradient travels back the same way."""
    arrived = collectives.all_to_all_single(rows.contiguous(), received, sent, group)
    return collectives.wait_tensor(arrived)  # type: ignore[no-any-return]


def _layers(model: nn.Module) -> Iterator[tuple[str, EcoMoE]]:
    layers = [(name, m) for name, m in model.named_modules() if isinstance(m, EcoMoE)]
    if not layers:
        raise ValueError(
            f"model={type(model).__name__} holds no EcoMoE layer; convert it first with "
            "ecomoe.convert(model, ...)"
        )
    yield from layers


def _expert_linears(layer: EcoMoE) -> list[ExpertLinear]:
    return [module for module in layer.experts.modules() if isinstance(module, ExpertLinear)]


def _check_shardable(module: nn.Module, mesh: DeviceMesh, *, name: str) -> EcoMoE:
    """Return the layer if its experts can be sharded over ``mesh``."""

    def refuse(problem: str) -> NoReturn:
        raise ValueError(f"layer {name!r}: {problem}")

    if not isinstance(module, EcoMoE):
        refuse(
            f"{type(module).__name__} is no EcoMoE layer; name the layers themselves in the plan"
        )
    if mesh.ndim != 1:
        refuse(f"mesh has {mesh.ndim} dimensions and must have 1; pass one of them, mesh['ep']")
    if isinstance(module.experts, ParallelExperts):
        refuse("its experts are sharded already; apply ExpertParallel once")
    if type(module.experts) not in _PARALLEL:
        refuse(
            f"experts={type(module.experts).__name__} have no parallel form; use one of "
            + ", ".join(kind.__name__ for kind in _PARALLEL)
        )
    if any(isinstance(parameter, DTensor) for parameter in module.parameters()):
        refuse("its parameters are DTensors already; shard the experts before fully_shard")
    if module.num_experts % mesh.size():
        refuse(
            f"num_experts={module.num_experts} must be a multiple of the mesh's {mesh.size()} "
            "ranks; change tiers or the mesh"
        )
    for part in module.experts.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm) and not isinstance(
            part, nn.SyncBatchNorm
        ):
            refuse(
                f"{type(part).__name__} among the experts would see one rank's slots alone; call "
                "torch.nn.SyncBatchNorm.convert_sync_batchnorm(model) first"
            )
    return module


# --- losses over data-parallel ranks ------------------------------------------------------------


def reduce_losses(model: nn.Module, group: ProcessGroup | DeviceMesh | None = None) -> nn.Module:
    """Make the auxiliary losses of ``model`` those of all ranks' tokens taken together.

    Without it each rank balances its own tokens, which is a little more than balancing the batch.
    With it the *mean over ranks* of ``ecomoe.aux_loss``, and of its gradient as DDP and FSDP
    average it, is that of one process with all the tokens, however they are spread over the ranks.

    Why this is exact. For n_r of the n tokens on rank r of W, the shares of all tokens are
    ``s = sum(n_r s_r) / n``, reduced by one small collective in each call of a layer. Every rank
    computes the same loss L(s) from them; its gradient goes to the rank's own s_r with a factor of
    1, and its loss counts ``W n_r / n`` times. The mean over ranks is then
    ``sum(n_r / n * L'(s) ds_r)``, the gradient of L(s); no collective is needed in the backward
    pass. Losses that are means over tokens get the same factor, and are exact too; those of
    parameters alone are, since the factors average to 1. (The ``dense`` oracle looks at no more
    than 256 tokens a rank, so there it is a sample that differs.)

    Ranks must call a layer equally often; any may have no tokens.

    Args:
        model: Any module that contains `EcoMoE` layers.
        group: The ranks that have different tokens: a process group or a one-dimensional mesh; by
            default all. Ranks that share their tokens (tensor parallelism) must not be in it both.

    Returns:
        The model.

    Raises:
        ValueError: No process group is initialized, there is no layer, or its losses are reduced
            already.
    """
    if not distributed.is_initialized():
        raise ValueError(
            "group=None needs a default process group; launch with torchrun and call "
            "torch.distributed.init_process_group() first"
        )
    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            raise ValueError(
                f"group is a mesh of {group.ndim} dimensions and must have 1; pass one of them, "
                "mesh['dp']"
            )
        group = group.get_group()
    layers = list(_layers(model))
    for name, layer in layers:
        if layer.reduce_shares is not None:
            raise ValueError(
                f"layer {name!r} already reduces its losses; call reduce_losses once, or set its "
                "reduce_shares to None first"
            )
    group = distributed.group.WORLD if group is None else group
    assert group is not None
    reduce = GroupShares(group)
    for _, layer in layers:
        layer.reduce_shares = reduce
    return model


class GroupShares:
    """Reduces shares over a process group; see `reduce_losses`.

    It belongs to a run: copies of a layer in this process share it, a pickled layer has none.
    """

    def __init__(self, group: ProcessGroup) -> None:
        self.group = group

    def __call__(self, means: Means, num_tokens: int) -> tuple[Means, Tensor]:
        """Return all ranks' means, and the factor on this rank's losses, a scalar ``W n_r / n``.

        Args:
            means: Over this rank's tokens; anything if it has none. They keep their gradient.
            num_tokens: How many it has.
        """
        # Means times tokens are sums, and the last one counts the tokens themselves.
        unit = torch.cat((*means, means[0].new_ones(1))).detach()
        sums = unit * num_tokens if num_tokens else torch.zeros_like(unit)
        sums = collectives.wait_tensor(collectives.all_reduce(sums, "sum", self.group))
        total = sums[-1].clamp_min(1.0)
        of_all = (sums[:-1] / total).chunk(len(means))
        through = (
            all_E + (own_E - own_E.detach()) if own_E.requires_grad else all_E
            for all_E, own_E in zip(of_all, means, strict=True)
        )
        factor = num_tokens * self.group.size() / total
        return type(means)(*through), factor

    def __deepcopy__(self, memo: dict[int, Any]) -> GroupShares:
        return self

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()


# --- FSDP ---------------------------------------------------------------------------------------


def check_gathered(model: nn.Module, name: str) -> Callable[[Tensor], None] | None:
    """Return a hook for the gradient of a layer's auxiliary loss; ``None`` without FSDP.

    FSDP gathers a unit's parameters when a gradient reaches the unit's output. An auxiliary loss is
    taken from beside the output. In ``task_loss + aux_loss(model)`` the outputs come first, and
    all is well. Alone it would find the parameters gone (torch reads freed memory then) or leave
    gradients that no one reduces.

    Args:
        model: What `ecomoe.aux_loss` was given.
        name: The layer's name in it.
    """
    # Those on the way down to the layer: a walk through all modules for each layer takes its time.
    parts = name.split(".") if name else []
    paths = [".".join(parts[:depth]) for depth in range(len(parts) + 1)]
    on_the_way = [(path, model.get_submodule(path)) for path in paths]
    units = [(path, module) for path, module in on_the_way if isinstance(module, FSDPModule)]
    if not units:
        return None

    def check(_: Tensor) -> None:
        for unit_name, unit in units:
            # No public name tells it (torch 2.14); without this one the check is off.
            state = getattr(unit._get_fsdp_state(), "_training_state", None)
            if state is not None and state.name != "PRE_BACKWARD":
                raise ValueError(
                    f"the auxiliary loss of layer {name!r} got a gradient before the output of its "
                    f"FSDP unit {unit_name!r} did; the backward pass must start from that output "
                    "too: add aux_loss(model) to a loss of the model's output (0.0 * output.sum() "
                    "will do)"
                )

    return check
