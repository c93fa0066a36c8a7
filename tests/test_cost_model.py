"""The cost model against values worked out by hand."""

from dataclasses import replace

import pytest

from ecomoe import cost_model as cost
from ecomoe import few_slots, pieces
from ecomoe.cost_model import LayerShape, Work
from ecomoe.device_cost import on_devices
from ecomoe.machines import H100, Cluster, Fitted, Host, Machine, Operation

# D=4, H=8, 2 experts, one a token: an expert has 2 * 4 * 8 = 64 weights.
TINY = LayerShape(4, 8, num_experts=2, top_k=1, router_hidden=0)
MACHINE = Machine(flops_per_second=1e9, bytes_per_second=1e9)
CLUSTER = Cluster("made up", MACHINE, memory=1e9, node=2, inside=100.0, outside=10.0)


def test_parameters():
    assert TINY.expert_parameters == 64
    assert LayerShape(4, 8, num_experts=2, gated=True).expert_parameters == 96
    assert TINY.router_parameters == 8
    assert LayerShape(4, 8, num_experts=2).router_parameters == 128 * 6
    assert (TINY.dense.d_hidden, TINY.dense.num_experts) == (8, 1)


def test_experts_work_by_hand():
    # 10 slots x 64 weights, a multiply-add is two.
    one = LayerShape(4, 8, num_experts=1, top_k=1, router_hidden=0)
    forward = cost.experts_work(one, tokens=10, training=False)
    assert forward.flops == 2 * 10 * 64
    # Up: rows 40, weights 32, hidden 80. Activation 80 + 80. Down: hidden 80, weights 32, rows 40.
    assert [operation.bytes for operation in forward.operations] == [4 * 152, 4 * 160, 4 * 152]
    step = cost.experts_work(one, tokens=10)
    assert step.flops == 3 * forward.flops
    # Each product twice over, the same operands in other places; the activation reads two and
    # writes one.
    backward = [4 * 152, 4 * 152, 4 * 240, 4 * 152, 4 * 152]
    assert [operation.bytes for operation in step.operations[3:]] == backward


def test_gated_experts_have_twice_the_hidden_features_before_the_activation():
    gated = LayerShape(4, 8, num_experts=1, top_k=1, gated=True, router_hidden=0)
    up, activation, down = cost.experts_work(gated, tokens=10, training=False).operations
    assert (up.flops, down.flops) == (2 * 10 * 64, 2 * 10 * 32)
    assert (up.bytes, activation.bytes) == (4 * (40 + 64 + 160), 4 * (160 + 80))


def test_dispatch_and_router_by_hand():
    # 10 tokens of 4 features to 10 slots and back: 4 passes of 40 + 40 values.
    assert cost.dispatch_work(TINY, tokens=10).bytes == 4 * 4 * 80
    router = cost.router_work(TINY, tokens=10, training=False)
    assert router.flops == 2 * 10 * 8
    assert router.bytes == 4 * (40 + 20) + 4 * 6 * 20


def test_recomputation_by_hand():
    # 10 tokens of 4 features to 10 slots; 10 slots of 8 hidden features: read and written for the
    # activation, two read, one written and read again for the gates. Gated, the activation reads
    # two.
    slots, plain, gates = cost.recomputation_work(TINY, tokens=10).operations
    assert (slots.bytes, plain.bytes, gates.bytes) == (4 * 80, 4 * 160, 4 * 320)
    gated = LayerShape(4, 8, num_experts=2, top_k=1, gated=True, router_hidden=0)
    assert cost.recomputation_work(gated, tokens=10).operations[1].bytes == 4 * 240
    step = cost.layer_work(TINY, tokens=10)
    parts = [cost.router_work, cost.dispatch_work, cost.experts_work, cost.recomputation_work]
    assert step.bytes == sum(part(TINY, tokens=10).bytes for part in parts)


def test_experts_are_launched_some_at_a_time():
    many = LayerShape(4, 8, num_experts=20, top_k=20, router_hidden=0)
    work = cost.experts_work(many, tokens=40)
    # In 32 bits an expert's gradients are products of its own rows; the sixth and eighth operation.
    assert [operation.launches for operation in work.operations] == [3, 3, 3, 3, 20, 3, 3, 20]
    narrow = LayerShape(4, 8, num_experts=20, top_k=20, itemsize=2, router_hidden=0)
    launches = [each.launches for each in cost.experts_work(narrow, tokens=40).operations]
    assert launches == [3] * 8
    dense = cost.dense_work(many, tokens=40)
    assert [operation.launches for operation in dense.operations] == [1] * 8
    # Few slots are not cut: their products alone are an expert's.
    few = cost.experts_work(many, tokens=32)
    assert [operation.launches for operation in few.operations] == [20, 1, 20, 20, 20, 1, 20, 20]
    # No two of 1,000 experts in use are neighbours.
    idle = LayerShape(4, 8, num_experts=1000, top_k=1, itemsize=2)
    launches = {each.launches for each in cost.experts_work(idle, tokens=10).operations}
    assert launches == {cost.experts_in_use(idle, tokens=10)}


def test_a_host_adds_up_what_an_operation_takes():
    host = Host(
        flops_per_second=10.0,
        bytes_per_second=100.0,
        fresh_bytes_per_second=20.0,
        seconds_per_launch=1.0,
        seconds_per_product=5.0,
        block_passes=3.0,
        fitted=Fitted(launch=2.0, forward=1000.0, training=5000.0, score=0.5),
    )
    # 30 flops, 400 bytes and 2 x 50 of blocks, 40 bytes to be supplied, 4 launches of a product.
    product = Operation(30.0, 400.0, blocked=50.0, fresh=40.0, launches=4)
    assert host.seconds(product) == pytest.approx(3.0 + 5.0 + 2.0 + 4 * 5.0 * 2.0)
    assert host.seconds(Operation(bytes=400.0, launches=4)) == pytest.approx(4.0 + 4 * 1.0 * 2.0)
    assert host.seconds(Operation(scores=6.0, launches=0)) == pytest.approx(3.0)
    assert host.parts(product) == {
        "products": 3.0,
        "memory": 4.0,
        "weights copied into blocks": 1.0,
        "memory from the system": 2.0,
        "launches": 40.0,
        "router scores": 0.0,
        "each call": 0.0,
    }
    for training, seconds in ((False, 1000.0), (True, 5000.0)):
        assert cost.call_work(training=training).seconds(host) == seconds
    # The roofline knows of none of these.
    assert MACHINE.seconds(Operation(scores=6.0, launches=9, call="training")) == 0.0


def test_products_of_several_rows_copy_their_weights_into_blocks():
    def blocked(itemsize, tokens, *, top_k=1):
        layer = LayerShape(4, 8, num_experts=2, top_k=top_k, itemsize=itemsize, router_hidden=0)
        works = cost.dense_work(layer, tokens=tokens), cost.experts_work(layer, tokens=tokens)
        return [[operation.blocked for operation in work.operations] for work in works]

    # One matrix is 32 weights. In 32 bits one row reads them as they are, and 20 do not.
    assert blocked(4, 1)[0] == [0.0] * 8
    assert blocked(4, 20)[0] == [128, 0, 128, 128, 0, 0, 128, 0]
    # In 16 bits one row has pairs too, and so has the gradient.
    assert blocked(2, 1)[0] == [64, 0, 64, 64, 64, 0, 64, 64]
    # Experts with 32 rows or fewer, on average, have no blocks in 32 bits.
    assert blocked(4, 64)[1] == [0.0] * 8
    assert blocked(4, 65)[1] == pytest.approx([256, 0, 256, 256, 0, 0, 256, 0], rel=1e-4)


def test_fresh_memory():
    # 4 Mi rows of 8 hidden features are 128 MiB; of 4, 64 MiB; the weights' gradients are small.
    rows = 2**22
    fresh = [operation.fresh for operation in cost.dense_work(TINY, tokens=rows).operations]
    wide, hidden = 4 * 4 * rows, 4 * 8 * rows
    assert fresh == [hidden, hidden, wide, hidden, 0, hidden, wide, 0]
    # The layer keeps its own, but for gradients of which most experts have no part.
    assert all(each.fresh == 0 for each in cost.experts_work(TINY, tokens=rows).operations)
    # Here each matrix of all of them is 32 MiB; one byte less is written whole.
    layer = LayerShape(4, 8, num_experts=2**18, top_k=2)
    few = cost.experts_work(layer, tokens=1).operations
    assert [each.fresh for each in few] == pytest.approx([0, 0, 0, 0, 256, 0, 0, 256])
    assert few[4].bytes == pytest.approx(4 * (2 * 4 + 2 * 8) + 256)
    smaller = LayerShape(4, 8, num_experts=2**18 - 1, top_k=2)
    written = cost.experts_work(smaller, tokens=1).operations[4]
    assert (written.fresh, written.bytes) == (0, 4 * (2 * 4 + 2 * 8) + (2**18 - 1) * 128)


def test_constants_are_those_of_what_they_describe():
    assert pieces.BATCHES[0] == cost.PIECE
    for name in ("FEW_OF_EXPERT", "FEW_IN_ALL", "VERY_FEW_OF_EXPERT", "FEW_IN_16_BITS"):
        assert getattr(few_slots, name) == getattr(cost, name), name
    assert pieces.FRESH == cost.GIVEN_BACK


def test_every_expert_gets_a_gradient_and_the_used_alone_are_read():
    few = LayerShape(4, 8, num_experts=1000, top_k=1, router_hidden=0)
    one = LayerShape(4, 8, num_experts=1, top_k=1, router_hidden=0)
    forward = [cost.experts_work(layer, tokens=1, training=False).bytes for layer in (few, one)]
    assert forward[0] == pytest.approx(forward[1])
    step = [cost.experts_work(layer, tokens=1).bytes for layer in (few, one)]
    assert step[0] - step[1] == pytest.approx(4 * 999 * 64)


def test_every_expert_gets_a_gradient_where_most_have_tokens():
    layer = LayerShape(4, 8, num_experts=4, top_k=3, router_hidden=0)
    three = cost.experts_work(LayerShape(4, 8, num_experts=3, top_k=3), tokens=1)
    step = cost.experts_work(layer, tokens=1)
    assert step.bytes - three.bytes == pytest.approx(4 * 64)


def test_experts_in_use():
    # Both of 2 experts are missed by neither of 2 tokens with probability 1/4 each.
    assert cost.experts_in_use(TINY, tokens=2) == pytest.approx(1.5)
    assert cost.experts_in_use(TINY, tokens=10_000) == pytest.approx(2.0)


def test_equal_flops_beside_the_dense_block():
    layer = LayerShape(512, 1024, num_experts=16, top_k=2)
    sparse = cost.experts_work(layer, tokens=4096)
    dense = cost.dense_work(layer, tokens=4096)
    assert sparse.flops == dense.flops == 3 * 2 * 4096 * 2 * 2 * 512 * 1024
    assert sparse.bytes > dense.bytes


def test_one_expert_costs_what_a_dense_block_costs_but_for_router_and_dispatch():
    layer = LayerShape(64, 256, num_experts=1, top_k=1, router_hidden=0)
    assert cost.experts_work(layer, tokens=100) == cost.dense_work(layer, tokens=100)
    assert cost.over_dense(layer, tokens=100, machine=MACHINE) > 1.0


def test_shared_experts_are_a_dense_block_of_their_width_on_both_sides():
    alone = LayerShape(64, 128, num_experts=4, router_hidden=0)
    layer = replace(alone, shared_hidden=96)
    shared = LayerShape(64, 96, num_experts=1, top_k=1, router_hidden=0)
    for training in (False, True):
        sizes = {"tokens": 100, "training": training}
        work, without = (cost.layer_work(each, **sizes) for each in (layer, alone))
        beside = cost.dense_work(shared, **sizes)
        assert work.flops == without.flops + beside.flops
        assert work.bytes == pytest.approx(without.bytes + beside.bytes)
        dense = cost.dense_work(layer, **sizes)
        assert dense.flops == cost.dense_work(alone, **sizes).flops + beside.flops
    assert layer.parameters == alone.parameters + 2 * 64 * 96
    assert layer.dense.d_hidden == 2 * 128 + 96


def test_limits_of_the_ratio():
    layer = LayerShape(512, 1024, num_experts=16, top_k=2)
    sparse, dense = cost.layer_work(layer, tokens=256), cost.dense_work(layer, tokens=256)
    fast_memory, fast_products = Machine(1e9, 1e30), Machine(1e30, 1e9)
    ratio = cost.over_dense(layer, tokens=256, machine=fast_memory)
    assert ratio == pytest.approx(sparse.flops / dense.flops)
    ratio = cost.over_dense(layer, tokens=256, machine=fast_products)
    assert ratio == pytest.approx(sparse.bytes / dense.bytes)


def test_on_a_gpu_an_operation_takes_its_longer_part_and_work_adds():
    work = Work((Operation(2e9, 1e9),)) + Work((Operation(1e9, 4e9),))
    assert (work.flops, work.bytes) == (3e9, 5e9)
    assert work.seconds(MACHINE) == pytest.approx(2.0 + 4.0)


def test_optimizer():
    # fp32: reads weight, gradient, two averages; writes weight, averages.
    assert cost.optimizer_bytes(10, itemsize=4) == 10 * (4 * 4 + 3 * 4)
    # bf16: weight and gradient are 2 bytes, and a wide copy is read and written.
    assert cost.optimizer_bytes(10, itemsize=2) == 10 * (2 + 2 + 8 + 2 + 8 + 8)
    assert cost.training_bytes(10, itemsize=4) == 10 * 16


# Of all three: the router's 8 weights of 4 bytes, averaged over all devices.
def test_all_to_all_volume_by_hand():
    # 2 devices, 10 tokens, one expert a token, 4 features of 4 bytes: 160 bytes a pass, half of
    # them for the other device, four passes.
    found = on_devices(TINY, tokens=10, devices=2, cluster=CLUSTER)
    assert found.sent == 4 * 160 / 2
    assert found.reduced == 2 * 8 * 4 / 2
    assert found.experts_per_device == 1
    assert found.communication == pytest.approx(320 / 100.0 + 32 / 100.0)
    assert found.memory == (64 + 8) * 16


def test_two_holders_of_an_expert_average_its_gradient():
    found = on_devices(TINY, tokens=10, devices=4, cluster=CLUSTER)
    # Its other holder stands two devices apart, in the other node of two. Of the router's 48 bytes
    # two parts in three go there.
    assert found.reduced == 2 * 64 * 4 / 2 + 2 * 8 * 4 * 3 / 4
    assert found.communication == pytest.approx(320 / 100.0 + 256 / 10.0 + 32 / 10.0)


def test_every_device_holds_the_shared_experts_whole():
    layer = replace(TINY, shared_hidden=3)
    alone, found = (
        on_devices(each, tokens=10, devices=4, cluster=CLUSTER) for each in (TINY, layer)
    )
    # 2 x 4 x 3 weights of 4 bytes: three parts of four go to the others, and come back.
    assert found.parameters == alone.parameters + 24
    assert found.memory == alone.memory + 24 * 16
    assert found.reduced == alone.reduced + 2 * 96 * 3 / 4
    assert found.sent == alone.sent
    assert found.optimizer == pytest.approx(alone.optimizer + 24 * 28 / 1e9)
    assert found.communication == pytest.approx(alone.communication + 96 / 10.0)
    products = 3 * 2 * 10 * 24 / 1e9
    assert found.compute > alone.compute + products


def test_other_nodes_decide_where_they_are_slower():
    layer = LayerShape(4, 8, num_experts=4, top_k=1, router_hidden=0)
    found = on_devices(layer, tokens=10, devices=4, cluster=CLUSTER)
    # 3/4 of 640 bytes to three others, two of them outside; and of the router's 2 x 64.
    assert found.sent == 480
    assert found.communication == pytest.approx(320 / 10.0 + 64 / 10.0)


def test_one_device_sends_nothing():
    found = on_devices(TINY, tokens=10, devices=1, cluster=CLUSTER)
    assert (found.sent, found.reduced, found.communication) == (0, 0, 0)
    assert found.seconds == found.compute + found.optimizer


def test_a_step_on_sixteen_devices_worked_out_by_hand():
    # D=1024, H=4096, 64 experts, top-2, bf16, 4,096 tokens on each of 16 devices, 8 a node.
    layer = LayerShape(1024, 4096, num_experts=64, top_k=2, itemsize=2, router_hidden=0)
    found = on_devices(layer, tokens=4096, devices=16)
    # 64 / 16 experts of 2 x 1024 x 4096 = 8,388,608 weights, a router of 65,536.
    assert found.experts_per_device == 4
    assert found.parameters == 536_936_448
    # 16 bytes a weight: 2 + 2 of itself and its gradient, 4 + 4 averages, 4 wide; fp32 too, 4 x 4.
    assert found.memory == 16 * (33_554_432 + 65_536)
    # 8,192 slots of 2,048 bytes are 16,777,216; 15 of 16 leave; four times.
    assert found.sent == 62_914_560
    # No expert has another holder; the router's 262,144 bytes go out and their mean comes back.
    assert found.reduced == 2 * 262_144 * 15 / 16
    # 7 of 15 others are in the node, at 450 GB/s; 8 are not, at 50 GB/s, and decide.
    outside = (62_914_560 + 491_520) * 8 / 15
    assert found.communication == pytest.approx(outside / 50e9)
    # AdamW of bf16 moves 30 bytes a weight, of the router's fp32 28, at 3.35 TB/s.
    assert found.optimizer == pytest.approx((30 * 33_554_432 + 28 * 65_536) / 3.35e12)
    # Arithmetic alone: 8,192 slots x 8,388,608 weights x 2, three times, at 494.5 TFLOP/s. The
    # router, dispatch and activation come on top: their bytes, some hundreds of MB.
    products = 3 * 2 * 8192 * 8_388_608 / 494.5e12
    assert products < found.compute < products + 1e9 / 3.35e12
    # The dense block's hidden layer is read and written by the activation; its gradient reads two.
    dense = products + 5 * 4096 * 8192 * 2 / 3.35e12
    dense += 30 * 16_777_216 / 3.35e12 + 2 * 33_554_432 * 15 / 16 * 8 / 15 / 50e9
    assert found.over_dense == pytest.approx(found.seconds / dense)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Machine(0.0, 1.0), "flops_per_second=0.0 must be positive"),
        (lambda: Machine(1.0, float("nan")), "bytes_per_second=nan must be positive"),
        (lambda: Host(1.0, 1.0, 0.0), "fresh_bytes_per_second=0.0 must be positive"),
        (lambda: Host(1.0, 1.0, seconds_per_launch=-1.0), "seconds_per_launch=-1.0 must be 0 or"),
        (lambda: Host(1.0, 1.0, seconds_per_product=float("inf")), "seconds_per_product=inf must"),
        (lambda: replace(H100, inside=0.0), "inside=0.0 must be positive"),
        (lambda: replace(H100, outside=-1.0), "outside=-1.0 must be positive"),
        (lambda: replace(H100, node=0), "node=0 must be an int >= 1"),
        (lambda: LayerShape(4, 8, num_experts=0), "num_experts=0 must be an int >= 1"),
        (lambda: LayerShape(4, 8, num_experts=2, top_k=3), "top_k=3 must be <= num_experts=2"),
        (lambda: replace(TINY, shared_hidden=2.0), "shared_hidden=2.0 must be an int >= 0"),
        (lambda: on_devices(TINY, tokens=10, devices=3), "devices=3 must divide"),
        (lambda: on_devices(TINY, tokens=0, devices=2), "tokens=0 must be an int >= 1"),
    ],
)
def test_errors_say_what_to_change(call, message):
    with pytest.raises(ValueError, match=message):
        call()
