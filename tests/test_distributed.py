"""Two ranks against one process that has all their tokens: outputs, losses and every gradient."""

import pytest
import torch
from parallel import (
    EVERY_LOSS,
    Case,
    run_clipping,
    run_compiled,
    run_ddp,
    run_evaluation,
    run_experts,
    run_fsdp,
    run_fsdp_alone,
    run_grid,
    run_halting,
    run_layer,
    run_mixed_precision,
    run_steps,
)
from parallel_state import run_copies, run_replication, run_state_dict, run_wrong_use
from ranks import Ranks
from torch import distributed

import ecomoe
from ecomoe.distributed import reduce_losses

# Errors are relative to the largest magnitude of a tensor. What differs from one process is the
# order of sums, so what can be is compared in fp64: up to 65 roundings of 2^-53 were seen. In fp32
# (2^-24 each) 5 of a fresh linear router's were, where either side is up to 6 from fp64. Others
# amplify them: a cosine router's scores by scale / T, whereby either side alone is up to 15 off.
# In bf16 (2^-8 each) a gradient is a sum of two ranks' roundings instead of one.
FP64 = 1e-14
FP32 = 8e-7
BF16 = 4 * 2**-8

TOKENS = [(7, 7), (5, 9), (14, 0)]
WAYS = pytest.mark.parametrize("relay", [False, True], ids=["explicit", "relay"])


@pytest.fixture(scope="module")
def ranks():
    ranks = Ranks(2)
    yield ranks
    ranks.stop()


@WAYS
@pytest.mark.parametrize("tokens", TOKENS)
class TestAgainstOneProcess:
    @pytest.mark.parametrize(
        "options", [{}, {"find_unused_parameters": True}, {"static_graph": True}], ids=str
    )
    def test_ddp(self, ranks, relay, tokens, options):
        assert max(ranks.run(run_ddp, Case(tokens=tokens, relay=relay), options)) < FP64

    @pytest.mark.parametrize("how", ["root", "blocks", "layers", "routers", "experts"])
    def test_fsdp(self, ranks, relay, tokens, how):
        assert max(ranks.run(run_fsdp, Case(tokens=tokens, relay=relay), how, {})) < FP64

    @pytest.mark.parametrize("how", [None, "ddp", "fsdp"])
    def test_expert_parallel(self, ranks, relay, tokens, how):
        assert max(ranks.run(run_experts, Case(tokens=tokens, relay=relay), how)) < FP64


@pytest.mark.parametrize("tokens", TOKENS)
def test_fp32(ranks, tokens):
    case = Case(dtype=torch.float32, tokens=tokens)
    assert max(ranks.run(run_ddp, case, {})) < FP32
    assert max(ranks.run(run_fsdp, case, "layers", {})) < FP32
    assert max(ranks.run(run_experts, case, None)) < FP32


@WAYS
@pytest.mark.parametrize("router", ["cosine", "hash", "random"])
class TestOtherRouters:
    def case(self, relay, router):
        return Case(arguments={**EVERY_LOSS, "router": router}, relay=relay)

    @pytest.mark.parametrize("options", [{}, {"static_graph": True}], ids=str)
    def test_ddp(self, ranks, relay, router, options):
        assert max(ranks.run(run_ddp, self.case(relay, router), options)) < FP64

    @pytest.mark.parametrize("how", ["root", "layers", "routers"])
    def test_fsdp(self, ranks, relay, router, how):
        assert max(ranks.run(run_fsdp, self.case(relay, router), how, {})) < FP64

    @pytest.mark.parametrize("how", [None, "ddp"])
    def test_expert_parallel(self, ranks, relay, router, how):
        assert max(ranks.run(run_experts, self.case(relay, router), how)) < FP64


@WAYS
@pytest.mark.parametrize("router", ["linear", "cosine", "hash"])
class TestHops:
    def case(self, relay, router):
        arguments = {**EVERY_LOSS, "router": router, "hops": 3}
        return Case(arguments=arguments, relay=relay, tokens=(5, 9))

    @pytest.mark.parametrize("options", [{}, {"static_graph": True}], ids=str)
    def test_ddp(self, ranks, relay, router, options):
        assert max(ranks.run(run_ddp, self.case(relay, router), options)) < FP64

    @pytest.mark.parametrize("how", ["root", "blocks", "layers"])
    def test_fsdp(self, ranks, relay, router, how):
        assert max(ranks.run(run_fsdp, self.case(relay, router), how, {})) < FP64

    @pytest.mark.parametrize("how", [None, "ddp", "fsdp"])
    def test_expert_parallel(self, ranks, relay, router, how):
        assert max(ranks.run(run_experts, self.case(relay, router), how)) < FP64


@pytest.mark.parametrize("tokens", [(5, 9), (14, 0)])
@pytest.mark.parametrize("how", ["ddp", "fsdp", "experts"])
def test_halting_on_ranks_with_different_tokens(ranks, how, tokens):
    case = Case(arguments={"router": "cosine", "hops": 4}, tokens=tokens)
    found = ranks.run(run_halting, case, how, 0.3)
    assert max(error for error, _, _ in found) < FP64
    (_, first, alone), (_, second, _) = found
    assert alone == [
        [a + b for a, b in zip(*pair, strict=True)] for pair in zip(first, second, strict=True)
    ]
    for tokens_by_hop in alone:
        assert 0 < tokens_by_hop[-1] < tokens_by_hop[0]


class TestExpertParallel:
    @pytest.mark.parametrize("idle", [(1,), (0, 1), (2, 3)])
    def test_experts_without_tokens(self, ranks, idle):
        assert max(ranks.run(run_experts, Case(idle=idle), None)) < FP64

    def test_ranks_whose_tokens_choose_different_experts(self, ranks):
        # One token a rank: at most two of four experts are chosen on each.
        assert max(ranks.run(run_experts, Case(tokens=(1, 1)), None)) < FP64

    def test_bf16(self, ranks):
        case = Case(dtype=torch.bfloat16)
        assert max(ranks.run(run_experts, case, None)) < BF16

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_checkpointing(self, ranks, reentrant):
        case = Case(relay=True, checkpointing=reentrant)
        assert max(ranks.run(run_experts, case, None)) < FP64

    @pytest.mark.parametrize("tokens", TOKENS)
    @pytest.mark.parametrize(
        ("arguments", "classes"),
        [
            ({"d_hidden": 6, "gated": True, "bias": False, "activation": "silu"}, None),
            ({"d_hidden": 6, "top_k": 1, "hidden_norm": torch.nn.LayerNorm(6)}, None),
            ({"d_hidden": 6, "top_k": 4, "activation": torch.nn.PReLU()}, None),
            ({"num_classes": 3, "oracle_weight": 1.0}, 3),
            ({"d_hidden": 6, "num_classes": 3, "oracle_weight": 1.0}, 3),
        ],
        ids=["gated", "norm", "activation", "heads", "hidden heads"],
    )
    def test_kinds_of_experts(self, ranks, arguments, classes, tokens):
        arguments = {"d_hidden": None, **arguments}
        assert max(ranks.run(run_layer, arguments, classes, tokens)) < FP64

    def test_evaluation_and_what_hooks_see(self, ranks):
        for seen, error in ranks.run(run_evaluation):
            assert seen == {"x": (10, 8), "y": (10, 8), "ends": (4,)}
            assert error < FP64

    def test_first_rank_gives_the_values(self, ranks):
        assert all(ranks.run(run_replication))

    def test_state_dict_round_trips(self, ranks, tmp_path):
        assert all(ranks.run(run_state_dict, str(tmp_path)))

    @pytest.mark.slow
    def test_beside_data_parallelism(self):
        ranks = Ranks(4)
        try:
            assert max(ranks.run(run_grid, Case(tokens=(3, 5, 0, 6)))) < FP64
        finally:
            ranks.stop()


class TestReducedLosses:
    def test_without_it_each_rank_balances_its_own(self, ranks):
        balance = {"balance_weight": 4.0, "target_e": 1e-3, "strength": 1.0}
        case = Case(arguments=balance, reduce=False)
        assert max(ranks.run(run_ddp, case, {})) > 0.01
        assert max(ranks.run(run_ddp, case._replace(reduce=True), {})) < FP64

    def test_copies_share_the_group_and_pickles_have_none(self, ranks):
        assert ranks.run(run_copies) == [[True, False]] * 2


@pytest.mark.slow
@pytest.mark.parametrize("how", ["losses", "experts"])
def test_compiles_to_one_graph(ranks, how):
    assert max(ranks.run(run_compiled, how)) < FP64


@pytest.mark.parametrize("how", ["static", "fsdp", "experts"])
def test_steps_of_an_optimizer(ranks, how):
    assert max(ranks.run(run_steps, how)) < FP64


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_clipping_the_common_norm(ranks, how):
    assert max(ranks.run(run_clipping, how)) < FP64


@pytest.mark.parametrize("how", ["root", "blocks", "routers"])
def test_auxiliary_loss_alone_under_fsdp(ranks, how):
    for message in ranks.run(run_fsdp_alone, how, False):
        assert "add aux_loss(model) to a loss of the model's output" in message
    assert max(ranks.run(run_fsdp_alone, how, True)) < FP64


def test_router_keeps_fp32_as_a_unit_of_its_own(ranks):
    wide, narrow = torch.float32, torch.bfloat16
    expected = {"router": wide, "logits": wide, "experts": narrow}
    assert ranks.run(run_mixed_precision) == [expected, expected]


WRONG = {
    "not a multiple": "num_experts=3 must be a multiple of the mesh's 2 ranks; change tiers",
    "twice": "experts are sharded already",
    "two dimensions": r"mesh has 2 dimensions and must have 1; pass one of them, mesh\['ep'\]",
    "no layer": "Linear holds no EcoMoE layer; convert it first",
    "no style for it": "Linear is no EcoMoE layer; name the layers themselves",
    "after DDP": "shard first: DistributedDataParallel",
    "after FSDP": "shard the experts before fully_shard",
    "batch norm": "BatchNorm1d among the experts would see one rank's slots alone",
    "reduced twice": "already reduces its losses; call reduce_losses once",
    "no losses": "Linear holds no EcoMoE layer",
    "mesh of losses": r"mesh of 2 dimensions and must have 1; pass one of them, mesh\['dp'\]",
}


def test_wrong_use(ranks):
    for messages in ranks.run(run_wrong_use):
        assert messages.keys() == WRONG.keys()
        for name, message in messages.items():
            with pytest.raises(ValueError, match=WRONG[name]):
                raise ValueError(message)


def test_reducing_needs_a_process_group():
    assert not distributed.is_initialized()
    with pytest.raises(ValueError, match="needs a default process group; launch with torchrun"):
        reduce_losses(ecomoe.EcoMoE(8, 6, tiers=(4,), **EVERY_LOSS))
