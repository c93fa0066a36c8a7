"""Operations, and how long a machine takes for them.

A GPU overlaps arithmetic with memory traffic, so an operation takes the longer of both: Williams,
Waterman and Patterson's roofline (2009). On a CPU they add up, and what does not grow with the
operands counts: see `Host`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Call = Literal["forward", "training"]

# How many times a product of several rows moves its weights, by their itemsize. MKL copies those
# of 32 bits into blocks: it reads and writes them, and reads the copy; measured, that takes 2.7
# times as long as reading them. oneDNN pairs the rows of those of 16 bits, for units that compute
# with pairs: 1.9 times.
BLOCK_PASSES = {4: 3.0, 2: 2.0}


@dataclass(frozen=True)
class Operation:
    """One pass over its operands.

    Attributes:
        flops: Floating-point operations of matrix products, a multiply-add counted as two.
        bytes: Bytes read from and written to memory.
        blocked: Bytes among them that a CPU's product copies into blocks first: of weights.
        fresh: Bytes among them in memory that the system has to supply.
        launches: In how many parts it is launched.
        scores: Router scores that softmax, top-k or losses go through.
        call: Set for what a call of a sparse layer takes besides its other operations.
    """

    flops: float = 0.0
    bytes: float = 0.0
    blocked: float = 0.0
    fresh: float = 0.0
    launches: float = 1.0
    scores: float = 0.0
    call: Call | None = None


@dataclass(frozen=True)
class Machine:
    """One device, by what it reaches.

    Attributes:
        flops_per_second: Of large matrix products.
        bytes_per_second: Of memory that was used before, reads and writes together.
    """

    flops_per_second: float
    bytes_per_second: float

    def __post_init__(self) -> None:
        _check_rates(self, "flops_per_second", "bytes_per_second")

    def seconds(self, operation: Operation) -> float:
        """Return how long an operation takes: as long as its arithmetic or its memory traffic."""
        arithmetic = operation.flops / self.flops_per_second
        return max(arithmetic, operation.bytes / self.bytes_per_second)


@dataclass(frozen=True)
class Fitted:
    """What the time of a layer on a CPU tells and no measurement beside it.

    Attributes:
        launch: How many times as long an operation's launch takes in a model as in a loop of it
            alone: other code and data come between, and Python and autograd around it.
        forward: Seconds of a sparse layer's forward pass whatever its size: routing, and the plan
            of which slot is whose.
        training: The same of a forward and a backward pass, losses and autograd included.
        score: Seconds of one pass over one router score of a token, in softmax, top-k and losses.
    """

    launch: float
    forward: float
    training: float
    score: float


# Fitted to the shapes of tests/benchmarks by `python -m tests.benchmarks.fit`.
FITTED = Fitted(launch=4.56, forward=0.000335, training=0.00217, score=1.41e-08)


@dataclass(frozen=True)
class Host(Machine):
    """A CPU: the machine's own constants, which `ecomoe.calibration` measures.

    An operation takes its arithmetic, its memory traffic and its launches, one after the other:
    the cores that compute are those that wait for memory.

    Attributes:
        flops_per_second: Of the three products of a training step, in the layer's dtype.
        fresh_bytes_per_second: Bytes a second that the system supplies, to which moving them adds.
        seconds_per_launch: What an operation takes that has all but nothing to do.
        seconds_per_product: The same of a matrix product in the layer's dtype.
        block_passes: How many times a product moves weights that it copies into blocks.
        fitted: What is not measured but fitted.
    """

    fresh_bytes_per_second: float = math.inf
    seconds_per_launch: float = 0.0
    seconds_per_product: float = 0.0
    block_passes: float = 1.0
    fitted: Fitted = FITTED

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_rates(self, "fresh_bytes_per_second")
        for name in ("seconds_per_launch", "seconds_per_product"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(
                    f"{name}={getattr(self, name)} must be 0 or more; give it as measured"
                )

    def seconds(self, operation: Operation) -> float:
        """Return how long an operation takes: its parts, one after the other."""
        return sum(self.parts(operation).values())

    def parts(self, operation: Operation) -> dict[str, float]:
        """Return the seconds that an operation takes, by what they are spent on."""
        copied = (self.block_passes - 1.0) * operation.blocked
        launch = self.seconds_per_product if operation.flops else self.seconds_per_launch
        return {
            "products": operation.flops / self.flops_per_second,
            "memory": operation.bytes / self.bytes_per_second,
            "weights copied into blocks": copied / self.bytes_per_second,
            "memory from the system": operation.fresh / self.fresh_bytes_per_second,
            "launches": operation.launches * launch * self.fitted.launch,
            "router scores": operation.scores * self.fitted.score,
            "each call": getattr(self.fitted, operation.call) if operation.call else 0.0,
        }


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

    def __post_init__(self) -> None:
        _check_rates(self, "inside", "outside")
        if type(self.node) is not int or self.node < 1:
            raise ValueError(f"node={self.node!r} must be an int >= 1; pass 1 for none joined")


def _check_rates(owner: object, *names: str) -> None:
    for name in names:
        if not getattr(owner, name) > 0:
            raise ValueError(
                f"{name}={getattr(owner, name)} must be positive; give it as measured, per second"
            )


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
