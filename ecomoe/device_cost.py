"""What a layer costs on many devices, experts spread over them; see `ecomoe.cost_model`."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ecomoe.cost_model import (
    ROUTER_BYTES,
    LayerShape,
    count,
    dense_work,
    dispatch_work,
    experts_work,
    optimizer_bytes,
    router_work,
    training_bytes,
)
from ecomoe.machines import H100, Cluster


@dataclass(frozen=True)
class DeviceCost:
    """One layer's training step on each of many devices, experts spread over them.

    Attributes:
        devices: P.
        experts_per_device: Experts that a device holds, 1 at least.
        parameters: Weights of the layer on all devices, each expert counted once.
        memory: Bytes of weights, gradients and optimizer state on a device.
        sent: Bytes that a device sends in the all-to-alls: out and back, forward and backward.
        reduced: Bytes that a device sends to average gradients: of its experts with their other
            holders, of the router and the shared experts with all devices.
        compute: Seconds of the layer's forward and backward pass.
        optimizer: Seconds of AdamW on the device's experts.
        communication: Seconds of all that is sent, nothing hidden behind computing.
        dense_seconds: The step of the dense block, which each device holds whole.
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
    dense_seconds: float

    @property
    def seconds(self) -> float:
        """The step's time, no part hidden behind another."""
        return self.compute + self.optimizer + self.communication

    @property
    def over_dense(self) -> float:
        """The step's time over the dense block's."""
        return self.seconds / self.dense_seconds


def on_devices(
    layer: LayerShape, *, tokens: int, devices: int, cluster: Cluster = H100
) -> DeviceCost:
    """Return what a layer's training step costs on each device under expert parallelism.

    Tokens spread evenly. With fewer experts than devices, groups of E devices hold the experts
    once each and average their gradients. Every device holds the router and the shared experts.

    Args:
        layer: The layer.
        tokens: Tokens of a device.
        devices: How many.
        cluster: What they are and how they are joined.

    Raises:
        ValueError: The number of devices and of experts do not divide each other.
    """
    count("tokens", tokens)
    count("devices", devices)
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
    # Slots go out and come back, and so do their gradients; a share of 1 / group stays.
    sent = 4.0 * tokens * layer.top_k * layer.d_model * layer.itemsize * (group - 1) / group
    holders = devices // group
    of_experts = _averaged_bytes(own * layer.itemsize, holders)
    of_router = _averaged_bytes(layer.router_parameters * ROUTER_BYTES, devices)
    spent = (
        _transfer_seconds(sent, group, cluster)
        + _transfer_seconds(of_experts, holders, cluster, apart=group)
        + _transfer_seconds(of_router, devices, cluster)
    )
    compute = work.seconds(cluster.machine)
    stepped = optimizer_bytes(own, itemsize=layer.itemsize)
    stepped += optimizer_bytes(layer.router_parameters, itemsize=ROUTER_BYTES)
    optimizer = stepped / cluster.machine.bytes_per_second
    twin = held_whole(layer.dense, tokens=tokens, devices=devices, cluster=cluster)
    found = DeviceCost(
        devices=devices,
        experts_per_device=held,
        parameters=layer.parameters,
        memory=training_bytes(own, itemsize=layer.itemsize)
        + training_bytes(layer.router_parameters, itemsize=ROUTER_BYTES),
        sent=sent,
        reduced=of_experts + of_router,
        compute=compute,
        optimizer=optimizer,
        communication=spent,
        dense_seconds=twin.seconds,
    )
    if layer.shared is None:
        return found
    shared = held_whole(layer.shared, tokens=tokens, devices=devices, cluster=cluster)
    added = ("memory", "reduced", "compute", "optimizer", "communication")
    return replace(found, **{name: getattr(found, name) + getattr(shared, name) for name in added})


def held_whole(
    block: LayerShape, *, tokens: int, devices: int, cluster: Cluster = H100
) -> DeviceCost:
    """Return what a dense block's training step costs on devices that hold it whole, each its own.

    Its gradients are averaged over all of them.

    Args:
        block: Sizes of a single expert without a router, such as `LayerShape.dense`.
        tokens: Tokens of a device.
        devices: How many.
        cluster: What they are and how they are joined.
    """
    compute = dense_work(block, tokens=tokens).seconds(cluster.machine)
    weights = block.expert_parameters
    moved = optimizer_bytes(weights, itemsize=block.itemsize)
    optimizer = moved / cluster.machine.bytes_per_second
    averaged = _averaged_bytes(weights * block.itemsize, devices)
    communication = _transfer_seconds(averaged, devices, cluster)
    return DeviceCost(
        devices=devices,
        experts_per_device=1,
        parameters=weights,
        memory=training_bytes(weights, itemsize=block.itemsize),
        sent=0.0,
        reduced=averaged,
        compute=compute,
        optimizer=optimizer,
        communication=communication,
        dense_seconds=compute + optimizer + communication,
    )


def _averaged_bytes(size: float, holders: int) -> float:
    """Return what a holder sends to average a gradient: a part to each other, and its mean."""
    return 2.0 * size * (holders - 1) / holders


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
