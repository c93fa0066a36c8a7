"""What a sparse layer costs on paper: FLOPs, bytes moved, memory, and traffic between devices.

Every operation reads its operands once and writes its result once, and takes as long as its
arithmetic or its memory traffic, whichever is longer: Williams, Waterman and Patterson's roofline
(2009). Besides, each takes some time whatever its size. `docs/benchmarks.md` says how near that
comes to what is measured.

Axes: N tokens, D features, H hidden features of an expert, E experts, K experts chosen for a token,
S = N * K slots.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ecomoe import arguments

ADAM_STATES = 2
STATE_BYTES = 4  # AdamW's two averages, and the wide copy of narrow weights, are fp32
ROUTER_BYTES = 4  # the router computes in fp32
PIECE = 8  # experts that one batched product is launched for, at most; see `ecomoe.pieces`

# Seconds that an operation of a layer takes on a CPU whatever its size: the start of its threads,
# and all small operators around it, forward and backward. The one constant that is fitted, to the
# shapes of tests/benchmarks on 2 cores; docs/benchmarks.md has it fitted without each of them.
CPU_OPERATION = 150e-6


@dataclass(frozen=True)
class Operation:
    """One pass over its operands.

    Attributes:
        flops: Floating-point operations, a multiply-add counted as two.
        bytes: Bytes read from and written to memory.
        launches: In how many parts it is launched.
    """

    flops: float
    bytes: float
    launches: int = 1

    def seconds(self, machine: Machine) -> float:
        """Return the time on a machine: of arithmetic or of memory, and that of its launches."""
        arithmetic = self.flops / machine.flops_per_second
        memory = self.bytes / machine.bytes_per_second
        return max(arithmetic, memory) + self.launches * machine.seconds_per_operation


@dataclass(frozen=True)
class Work:
    """Operations, one after the other."""

    operations: tuple[Operation, ...] = ()

    def __add__(self, other: Work) -> Work:
        return Work(self.operations + other.operations)

    @property
    def flops(self) -> float:
        """Floating-point operations in all."""
        return sum(operation.flops for operation in self.operations)

    @property
    def bytes(self) -> float:
        """Bytes moved in all."""
        return sum(operation.bytes for operation in self.operations)

    def seconds(self, machine: Machine) -> float:
        """Return the time on a machine."""
        return sum(operation.seconds(machine) for operation in self.operations)


@dataclass(frozen=True)
class Machine:
    """The constants of one device.

    Attributes:
        flops_per_second: What large matrix products reach.
        bytes_per_second: What memory reaches, reads and writes together.
        seconds_per_operation: What an operation takes whatever its size; `CPU_OPERATION` on a CPU.
    """

    flops_per_second: float
    bytes_per_second: float
    seconds_per_operation: float = 0.0

    def __post_init__(self) -> None:
        for name in ("flops_per_second", "bytes_per_second"):
            if not getattr(self, name) > 0:
                raise ValueError(
                    f"{name}={getattr(self, name)} must be positive; give it as measured, per "
                    "second"
                )


@dataclass(frozen=True)
class Cluster:
    """Devices in nodes.

    Attributes:
        name: What the numbers are of.
        machine: One device.
        memory: Bytes of a device.
        node: Devices of a node.
        inside: Bytes a second that a device sends to others of its node.
        outside: Bytes a second that a device sends to other nodes.
    """

    name: str
    machine: Machine
    memory: float
    node: int
    inside: float
    outside: float


# NVIDIA's data sheet of the H100 SXM5 80 GB: 989 TFLOP/s in dense bf16, 3.35 TB/s; NVLink 900 GB/s,
# both directions together; one 400 Gbit/s network port a device. Half of the peak rate is what
# large training runs report reaching.
H100 = Cluster(
    name="H100 SXM5, half of its peak rate, 8 a node, 400 Gbit/s a device",
    machine=Machine(0.5 * 989e12, 3.35e12),
    memory=80e9,
    node=8,
    inside=450e9,
    outside=50e9,
)


@dataclass(frozen=True)
class LayerShape:
    """The sizes of a layer that decide its cost; the names are those of `ecomoe.EcoMoE`.

    Attributes:
        d_model: D.
        d_hidden: H.
        num_experts: E.
        top_k: K.
        gated: Whether experts are gated: three matrices in place of two.
        itemsize: Bytes of a weight and of an activation.
        router_hidden: Hidden features of the router, 128 for ``router="mlp"``, 0 for ``"linear"``.

    Raises:
        ValueError: A size breaks its rule.
    """

    d_model: int
    d_hidden: int
    num_experts: int
    top_k: int = 2
    gated: bool = False
    itemsize: int = 4
    router_hidden: int = 128

    def __post_init__(self) -> None:
        for name in ("d_model", "d_hidden", "num_experts", "itemsize"):
            _count(name, getattr(self, name))
        arguments.experts_per_token(self.top_k, num_experts=self.num_experts)

    @property
    def matrices(self) -> int:
        """The D x H matrices of an expert."""
        return 3 if self.gated else 2

    @property
    def expert_parameters(self) -> int:
        """The weights of one expert, biases left out.

        >>> LayerShape(512, 1024, num_experts=16).expert_parameters
        1048576
        """
        return self.matrices * self.d_model * self.d_hidden

    @property
    def router_parameters(self) -> int:
        """The weights of the router."""
        if not self.router_hidden:
            return self.d_model * self.num_experts
        return self.router_hidden * (self.d_model + self.num_experts)

    @property
    def dense(self) -> LayerShape:
        """The dense block of equal active FLOPs: one expert, K times as wide, and no router."""
        return LayerShape(
            self.d_model,
            self.top_k * self.d_hidden,
            num_experts=1,
            top_k=1,
            gated=self.gated,
            itemsize=self.itemsize,
            router_hidden=0,
        )


def experts_in_use(layer: LayerShape, *, tokens: int) -> float:
    """Return how many experts have tokens where each token draws K of E evenly, on average.

    >>> experts_in_use(LayerShape(8, 8, num_experts=4, top_k=2), tokens=1)
    2.0
    """
    share = layer.top_k / layer.num_experts
    return layer.num_experts * (1.0 - (1.0 - share) ** tokens)


def experts_work(layer: LayerShape, *, tokens: int, training: bool = True) -> Work:
    """Return the work of the experts' products and activations on their slots.

    Training is forward and backward. The backward pass computes each product twice over, for its
    inputs and for its weights; it reads the weights again, and writes a gradient for every expert,
    in use or not.
    """
    slots = tokens * layer.top_k
    used = experts_in_use(layer, tokens=tokens)
    matrix = layer.d_model * layer.d_hidden
    ups = layer.matrices - 1
    rows, hidden = slots * layer.d_model, slots * layer.d_hidden

    launches = _pieces(used)

    def moving(values: float, flops: float = 0.0) -> Operation:
        return Operation(flops, values * layer.itemsize, launches)

    up_flops, down_flops = 2.0 * slots * ups * matrix, 2.0 * slots * matrix
    operations = [
        moving(rows + used * ups * matrix + ups * hidden, up_flops),
        moving(ups * hidden + hidden),
        moving(hidden + used * matrix + rows, down_flops),
    ]
    if training:
        operations += [
            moving(rows + used * matrix + hidden, down_flops),
            moving(rows + hidden + layer.num_experts * matrix, down_flops),
            moving(hidden + 2 * ups * hidden),
            moving(ups * hidden + used * ups * matrix + rows, up_flops),
            moving(ups * hidden + rows + layer.num_experts * ups * matrix, up_flops),
        ]
    return Work(tuple(operations))


def _pieces(used: float) -> int:
    return math.ceil(used / PIECE)


def recomputation_work(layer: LayerShape, *, tokens: int) -> Work:
    """Return what the backward pass on a CPU computes besides: the activation again, and the gates.

    A gate's gradient is the sum, over hidden features, of a product of two.
    """
    launches = _pieces(experts_in_use(layer, tokens=tokens))
    hidden = tokens * layer.top_k * layer.d_hidden * layer.itemsize
    again = Operation(0.0, float(layer.matrices * hidden), launches)
    return Work((again, Operation(0.0, 4.0 * hidden, launches)))


def dispatch_work(layer: LayerShape, *, tokens: int, training: bool = True) -> Work:
    """Return the work of bringing tokens to slots and slots to tokens.

    Each way reads the one and writes the other; backward does the same. Products read and write
    the slots once more, which `experts_work` counts.
    """
    once = tokens * layer.d_model * (1 + layer.top_k) * layer.itemsize
    return Work((Operation(0.0, float(once)),) * (4 if training else 2))


def router_work(layer: LayerShape, *, tokens: int, training: bool = True) -> Work:
    """Return the work of the router's products, and of a softmax and the losses on its logits."""
    flops = 2.0 * tokens * layer.router_parameters
    logits, hidden = tokens * layer.num_experts, tokens * layer.router_hidden
    moved = tokens * layer.d_model + 2 * hidden + logits
    # Logits are read and written by softmax, top-k, gates and, in training, each loss.
    scored = 6 * logits * (3 if training else 1)
    products = (Operation(flops, moved * ROUTER_BYTES),) * (3 if training else 1)
    return Work((*products, Operation(0.0, scored * ROUTER_BYTES)))


def layer_work(layer: LayerShape, *, tokens: int, training: bool = True) -> Work:
    """Return the work of the whole layer on a CPU: router, dispatch, experts."""
    work = (
        router_work(layer, tokens=tokens, training=training)
        + dispatch_work(layer, tokens=tokens, training=training)
        + experts_work(layer, tokens=tokens, training=training)
    )
    return work + recomputation_work(layer, tokens=tokens) if training else work


def dense_work(layer: LayerShape, *, tokens: int, training: bool = True) -> Work:
    """Return the work of the dense block of equal active FLOPs."""
    return experts_work(layer.dense, tokens=tokens, training=training)


def over_dense(layer: LayerShape, *, tokens: int, machine: Machine, training: bool = True) -> float:
    """Return the layer's predicted time over that of the dense block of equal active FLOPs."""
    sparse = layer_work(layer, tokens=tokens, training=training)
    dense = dense_work(layer, tokens=tokens, training=training)
    return sparse.seconds(machine) / dense.seconds(machine)


def optimizer_bytes(parameters: int, *, itemsize: int) -> float:
    """Return what AdamW reads and writes in a step: weight, gradient, two averages, wide copy.

    >>> optimizer_bytes(1, itemsize=4)
    28.0
    """
    read = 2 * itemsize + ADAM_STATES * STATE_BYTES
    written = itemsize + ADAM_STATES * STATE_BYTES
    wide = 2 * STATE_BYTES if itemsize < STATE_BYTES else 0
    return float(parameters * (read + written + wide))


def training_bytes(parameters: int, *, itemsize: int) -> float:
    """Return the memory of weights, gradients and AdamW's state.

    >>> training_bytes(1, itemsize=4), training_bytes(1, itemsize=2)
    (16.0, 16.0)
    """
    wide = STATE_BYTES if itemsize < STATE_BYTES else 0
    return float(parameters * (2 * itemsize + ADAM_STATES * STATE_BYTES + wide))


@dataclass(frozen=True)
class DeviceCost:
    """One layer's training step on each of many devices, experts spread over them.

    Attributes:
        devices: P.
        experts_per_device: Experts that a device holds, 1 at least.
        parameters: Weights of the layer on all devices, each expert counted once.
        memory: Bytes of weights, gradients and optimizer state on a device.
        sent: Bytes that a device sends in the all-to-alls: out and back, forward and backward.
        reduced: Bytes that a device sends to average gradients with other holders of its experts.
        compute: Seconds of the layer's forward and backward pass.
        optimizer: Seconds of AdamW on the device's experts.
        communication: Seconds of all that is sent, nothing hidden behind computing.
        over_dense: Seconds of all over the dense block's, which each device holds whole.
    """

    devices: int
    experts_per_device: int
    parameters: int
    memory: float
    sent: float
    reduced: float
    compute: float
    optimizer: float
    communication: float
    over_dense: float

    @property
    def seconds(self) -> float:
        """The step's time, no part hidden behind another."""
        return self.compute + self.optimizer + self.communication


def on_devices(
    layer: LayerShape, *, tokens: int, devices: int, cluster: Cluster = H100
) -> DeviceCost:
    """Return what a layer's training step costs on each device under expert parallelism.

    Tokens spread evenly. With fewer experts than devices, groups of E devices hold the experts
    once each and average their gradients. Every device holds the router.

    Args:
        layer: The layer.
        tokens: Tokens of a device.
        devices: How many.
        cluster: What they are and how they are joined.

    Raises:
        ValueError: The number of devices and of experts do not divide each other.
    """
    _count("tokens", tokens)
    _count("devices", devices)
    group = min(devices, layer.num_experts)
    if layer.num_experts % group or devices % group:
        raise ValueError(
            f"devices={devices} must divide num_experts={layer.num_experts} or be a multiple of "
            "it; choose another number of devices"
        )
    held = layer.num_experts // group
    own = held * layer.expert_parameters
    # A device's experts get as many slots as its tokens make: K * N on average.
    local = LayerShape(
        layer.d_model,
        layer.d_hidden,
        num_experts=held,
        top_k=1,
        gated=layer.gated,
        itemsize=layer.itemsize,
        router_hidden=0,
    )
    work = (
        router_work(layer, tokens=tokens)
        + dispatch_work(layer, tokens=tokens)
        + experts_work(local, tokens=tokens * layer.top_k)
    )
    sent = 4.0 * tokens * layer.top_k * layer.d_model * layer.itemsize * (group - 1) / group
    holders = devices // group
    reduced = 2.0 * own * layer.itemsize * (holders - 1) / holders
    kept = own + layer.router_parameters
    spent = _transfer_seconds(sent, group, cluster) + _transfer_seconds(
        reduced, holders, cluster, apart=group
    )
    compute = work.seconds(cluster.machine)
    optimizer = optimizer_bytes(kept, itemsize=layer.itemsize) / cluster.machine.bytes_per_second
    dense = layer.dense
    twin = dense_work(layer, tokens=tokens).seconds(cluster.machine)
    twin += (
        optimizer_bytes(dense.expert_parameters, itemsize=layer.itemsize)
        / cluster.machine.bytes_per_second
    )
    # Every device holds the dense block whole, so its gradients are averaged over all of them.
    averaged = 2.0 * dense.expert_parameters * layer.itemsize * (devices - 1) / devices
    twin += _transfer_seconds(averaged, devices, cluster)
    return DeviceCost(
        devices=devices,
        experts_per_device=held,
        parameters=layer.num_experts * layer.expert_parameters + layer.router_parameters,
        memory=training_bytes(kept, itemsize=layer.itemsize),
        sent=sent,
        reduced=reduced,
        compute=compute,
        optimizer=optimizer,
        communication=spent,
        over_dense=(compute + optimizer + spent) / twin,
    )


def _transfer_seconds(sent: float, group: int, cluster: Cluster, *, apart: int = 1) -> float:
    """Return the time to send evenly to a group whose members stand ``apart`` devices apart.

    Both kinds of link work at once; the slower one decides.
    """
    if group == 1:
        return 0.0
    near = max(1, min(group, cluster.node // apart)) - 1
    far = group - 1 - near
    share = sent / (group - 1)
    return max(share * near / cluster.inside, share * far / cluster.outside)


def _count(name: str, value: object) -> None:
    if type(value) is not int or value < 1:
        raise ValueError(f"{name}={value!r} must be an int >= 1; pass how many there are")
