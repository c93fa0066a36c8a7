"""What a sparse layer costs on paper: FLOPs, bytes moved, memory and optimizer state.

Every operation reads its operands once and writes its result once; `ecomoe.machines` says how long
a machine takes for that. `docs/benchmarks.md` says how near it comes to what is measured.

Axes: N tokens, D features, H hidden features of an expert, E experts, K experts chosen for a token,
S = N * K slots.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ecomoe import arguments
from ecomoe.machines import Machine, Operation

ADAM_STATES = 2
STATE_BYTES = 4  # AdamW's two averages, and the wide copy of narrow weights, are fp32
ROUTER_BYTES = 4  # the router computes in fp32

# How the layer goes through its slots on a CPU: some experts at a time in a batched product, or, of
# few slots, all at once and none padded.
PIECE = 8  # experts of a batched product at most
FEW_OF_EXPERT = 32  # slots an expert up to which they are few, in 32 bits
FEW_IN_ALL = 4096  # slots in all beyond which they are not, where an expert has
VERY_FEW_OF_EXPERT = 8  # more than so many
FEW_IN_16_BITS = 8  # slots in all up to which they are few, in 16

# glibc gives a block of this size back to the system when it is freed; the layer's own large ones
# are kept, but for a gradient of this size of which most experts have no part.
GIVEN_BACK = 2**25


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
        return sum(machine.seconds(operation) for operation in self.operations)


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
        shared_hidden: Hidden features of experts that every token takes besides, which models of
            others have; 0 for none.

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
    shared_hidden: int = 0

    def __post_init__(self) -> None:
        for name in ("d_model", "d_hidden", "num_experts", "itemsize"):
            count(name, getattr(self, name))
        count("shared_hidden", self.shared_hidden, least=0)
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
    def parameters(self) -> int:
        """The weights of all experts, the shared ones and the router."""
        shared = self.matrices * self.d_model * self.shared_hidden
        return self.num_experts * self.expert_parameters + shared + self.router_parameters

    @property
    def dense(self) -> LayerShape:
        """The dense block of equal active FLOPs: one expert, as wide as those of a token."""
        return self.block(self.top_k * self.d_hidden + self.shared_hidden)

    @property
    def shared(self) -> LayerShape | None:
        """The shared experts, which are a dense block too; None without."""
        return self.block(self.shared_hidden) if self.shared_hidden else None

    def block(self, d_hidden: int) -> LayerShape:
        """Return a dense block of another width: one expert, and no router."""
        return LayerShape(
            self.d_model,
            d_hidden,
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
    used = experts_in_use(layer, tokens=tokens)
    mostly_idle = 2 * used < layer.num_experts
    narrow = layer.itemsize < STATE_BYTES
    few, launches = _are_few(layer, tokens=tokens), _launches(layer, tokens=tokens)
    products = used if few else launches
    # In 32 bits a gradient is a product of its expert's own rows.
    gradients = launches if narrow and not few else used
    return _products_work(
        layer,
        rows=tokens * layer.top_k,
        weights=used,
        gradients=layer.num_experts,
        met=used if mostly_idle else None,
        keeps=True,
        # In 32 bits a product of few rows reads weights as they are.
        blocked=narrow or not few,
        launches=(launches, products, gradients),
        training=training,
    )


def _are_few(layer: LayerShape, *, tokens: int) -> bool:
    slots = tokens * layer.top_k
    if layer.itemsize < STATE_BYTES:
        return slots <= FEW_IN_16_BITS
    most = min(FEW_OF_EXPERT * layer.num_experts, FEW_IN_ALL)
    return slots <= max(most, VERY_FEW_OF_EXPERT * layer.num_experts)


def _launches(layer: LayerShape, *, tokens: int) -> float:
    """Return in how many parts an operation on the slots is launched."""
    used = experts_in_use(layer, tokens=tokens)
    if _are_few(layer, tokens=tokens):
        return 1
    # Neighbours that are in use make a piece.
    return used if 2 * used < layer.num_experts else math.ceil(used / PIECE)


def dense_work(layer: LayerShape, *, tokens: int, training: bool = True) -> Work:
    """Return the work of the dense block of equal active FLOPs; a dense block's is its own."""
    # A product of one row reads weights of 32 bits as they are.
    blocked = layer.itemsize < STATE_BYTES or tokens > 1
    return _products_work(
        layer.dense, rows=tokens, weights=1.0, gradients=1.0, blocked=blocked, training=training
    )


def shared_work(layer: LayerShape, *, tokens: int, training: bool = True) -> Work:
    """Return the work of the shared experts: none where there are none."""
    shared = layer.shared
    return Work() if shared is None else dense_work(shared, tokens=tokens, training=training)


def _products_work(
    layer: LayerShape,
    *,
    rows: int,
    weights: float,
    gradients: float,
    blocked: bool,
    training: bool,
    met: float | None = None,
    keeps: bool = False,
    launches: tuple[float, float, float] = (1.0, 1.0, 1.0),
) -> Work:
    """Return the work of the products and activations between them.

    Args:
        layer: The sizes.
        rows: Rows in all.
        weights: Of how many experts the weights are read.
        gradients: Of how many experts the weights' gradients are written.
        blocked: Whether products copy the weights into blocks.
        training: Whether there is a backward pass.
        met: Of how many experts they are written where all are large: the others' are zeros as the
            system supplies them. ``None`` where it supplies none.
        keeps: Whether large memory is kept for the next step; if not, the system supplies it.
        launches: In how many parts an activation is launched, a product, and that of a gradient.
    """
    matrix = layer.d_model * layer.d_hidden
    ups = layer.matrices - 1
    wide, hidden = rows * layer.d_model, rows * layer.d_hidden
    by_activation, by_product, by_gradient = launches

    def supplied(size: float) -> float:
        return size if size >= GIVEN_BACK else 0.0

    def moving(
        read: float, written: float, *, flops: float = 0.0, read_weights: float = 0.0
    ) -> Operation:
        return Operation(
            flops,
            (read + read_weights + written) * layer.itemsize,
            blocked=read_weights * layer.itemsize if blocked else 0.0,
            fresh=0.0 if keeps else supplied(written * layer.itemsize),
            launches=by_product if flops else by_activation,
        )

    def gradient(read: float, number: int, flops: float) -> Operation:
        each = number * matrix * layer.itemsize
        written, fresh = gradients * each, 0.0
        if met is not None and supplied(written):
            written = fresh = met * each
        elif not keeps:
            fresh = supplied(written)
        return Operation(
            flops,
            read * layer.itemsize + written,
            # In 16 bits it is a product with pairs of rows too.
            blocked=written if layer.itemsize < STATE_BYTES else 0.0,
            fresh=fresh,
            launches=by_gradient,
        )

    up, down = weights * ups * matrix, weights * matrix
    up_flops, down_flops = 2.0 * rows * ups * matrix, 2.0 * rows * matrix
    operations = [
        moving(wide, ups * hidden, flops=up_flops, read_weights=up),
        moving(ups * hidden, hidden),
        moving(hidden, wide, flops=down_flops, read_weights=down),
    ]
    if training:
        operations += [
            moving(wide, hidden, flops=down_flops, read_weights=down),
            gradient(wide + hidden, 1, down_flops),
            moving(hidden + ups * hidden, ups * hidden),
            moving(ups * hidden, wide, flops=up_flops, read_weights=up),
            gradient(ups * hidden + wide, ups, up_flops),
        ]
    return Work(tuple(operations))


def recomputation_work(layer: LayerShape, *, tokens: int) -> Work:
    """Return what the backward pass on a CPU computes besides: slots, the activation, the gates.

    A gate's gradient is the sum, over hidden features, of a product of two.
    """
    launches = _launches(layer, tokens=tokens)
    slots = tokens * layer.top_k
    hidden = slots * layer.d_hidden * layer.itemsize
    gathered = (tokens + slots) * layer.d_model * layer.itemsize
    return Work(
        (
            Operation(bytes=float(gathered), launches=launches),
            Operation(bytes=float(layer.matrices * hidden), launches=launches),
            Operation(bytes=4.0 * hidden, launches=launches),
        )
    )


def dispatch_work(layer: LayerShape, *, tokens: int, training: bool = True) -> Work:
    """Return the work of bringing tokens to slots and slots to tokens.

    Each way reads the one and writes the other; backward does the same. Products read and write
    the slots once more, which `experts_work` counts.
    """
    once = float(tokens * layer.d_model * (1 + layer.top_k) * layer.itemsize)
    launches = _launches(layer, tokens=tokens)
    to_slots, from_slots = Operation(bytes=once, launches=launches), Operation(bytes=once)
    return Work((to_slots, from_slots) * (2 if training else 1))


def router_work(layer: LayerShape, *, tokens: int, training: bool = True) -> Work:
    """Return the work of the router's products, and of a softmax and the losses on its logits."""
    times = 3 if training else 1
    flops = 2.0 * tokens * layer.router_parameters
    logits, hidden = tokens * layer.num_experts, tokens * layer.router_hidden
    moved = float(tokens * layer.d_model + 2 * hidden + logits)
    # Logits are read and written by softmax, top-k, gates and, in training, each loss.
    scored = 6.0 * logits * times
    product = Operation(flops, moved * ROUTER_BYTES)
    return Work(
        (product,) * times + (Operation(bytes=scored * ROUTER_BYTES, scores=float(logits * times)),)
    )


def call_work(*, training: bool = True) -> Work:
    """Return what a call of the layer takes besides: small operators, Python and autograd."""
    return Work((Operation(launches=0, call="training" if training else "forward"),))


def layer_work(layer: LayerShape, *, tokens: int, training: bool = True) -> Work:
    """Return the work of the whole layer on a CPU: router, dispatch, experts, shared ones."""
    work = (
        call_work(training=training)
        + router_work(layer, tokens=tokens, training=training)
        + dispatch_work(layer, tokens=tokens, training=training)
        + experts_work(layer, tokens=tokens, training=training)
        + shared_work(layer, tokens=tokens, training=training)
    )
    return work + recomputation_work(layer, tokens=tokens) if training else work


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


def count(name: str, value: object, *, least: int = 1) -> None:
    """Check a number of things: an int from ``least`` on.

    Raises:
        ValueError: It is none.
    """
    if type(value) is not int or value < least:
        raise ValueError(f"{name}={value!r} must be an int >= {least}; pass how many there are")
