"""The benchmark's instruments: what they measure is what they say. Nothing here is timed."""

import itertools
import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from ecomoe.machines import Host
from tests.benchmarks import aims, fit, layer, misses, page, plots, shapes
from tests.benchmarks.contenders import Forced, PeerRouter, build_ours, build_transformers
from tests.benchmarks.shapes import FEW, LARGE, LONG, MANY, Shape
from tests.benchmarks.timing import STATUS, Contender, paired, quartiles, race

SMALL = Shape(64, 16, num_experts=4, top_k=2, d_hidden=8)
MACHINES = {name: Host(1e11, 1e10, 5e9, 5e-6, 6e-6) for name in ("fp32", "bf16")}
CONSTANTS = {name: fit.constants_of(machine) for name, machine in MACHINES.items()}


def forced(shape):
    found = Forced()
    found.draw(shape, torch.Generator().manual_seed(0), torch.device("cpu"))
    return found


@pytest.mark.parametrize("load", ["balanced", "zipf", "one"])
def test_all_contenders_send_tokens_alike(load):
    shape = Shape(**{**vars(SMALL), "load": load, "tokens": 4096})
    given = forced(shape)
    x_ND = torch.randn(shape.tokens, shape.d_model)
    wanted_NK = given.logits_NE.topk(2, dim=-1).indices
    ours = build_ours(shape, given)
    routed = ours.router(x_ND, ours.temperature).expert_ids_NK
    _, _, peers = PeerRouter(shape, given)(x_ND)
    for ids_NK in (routed, peers):
        assert (ids_NK == wanted_NK).float().mean() > 0.98
    share_E = torch.bincount(routed[:, 0], minlength=4) / shape.tokens
    expected = {"balanced": 0.25, "zipf": 1 / (1 + 1 / 2 + 1 / 3 + 1 / 4), "one": 1.0}[load]
    assert share_E[0] == pytest.approx(expected, abs=0.04)


@pytest.mark.parametrize("gated", [False, True])
def test_peer_computes_the_same_in_each_implementation(gated):
    shape = Shape(**{**vars(SMALL), "gated": gated})
    blocks = []
    for name in ("eager", "grouped_mm", "batched_mm"):
        torch.manual_seed(0)
        blocks.append(build_transformers(shape, forced(shape), name))
    x_ND = torch.randn(shape.tokens, shape.d_model)
    for block in blocks[1:]:
        block.load_state_dict(blocks[0].state_dict())
        torch.testing.assert_close(block(x_ND), blocks[0](x_ND))


def test_saved_bytes_counts_each_storage_once_and_no_weight():
    # x is saved for the weight's gradient, the product for the square's; views share a storage.
    class Square(nn.Module):
        def __init__(self):
            super().__init__()
            self.map = nn.Linear(8, 4, bias=False)

        def forward(self, x_ND):
            y_NF = self.map(x_ND)
            return y_NF * y_NF.view(y_NF.shape)

    found = Contender("square", Square()).saved_bytes(torch.randn(10, 8))
    assert found == 10 * 8 * 4 + 10 * 4 * 4


def test_saved_bytes_leaves_out_what_is_gone_with_its_node():
    class Glance(nn.Module):
        def forward(self, x_ND):
            x_ND.softmax(-1)  # saves its own result, which nobody reads
            return 2.0 * x_ND

    assert Contender("glance", Glance()).saved_bytes(torch.randn(10, 8)) == 0


@pytest.mark.skipif(not STATUS.exists(), reason="the system does not tell")
def test_peak_bytes_sees_what_is_freed_again():
    class Detour(nn.Module):
        def forward(self, x_ND):
            wide = torch.ones(10_000_000)
            return x_ND * wide.sum()

    peak = Contender("detour", Detour()).peak_bytes(torch.randn(2, 2), torch.ones(2, 2))
    assert 36_000_000 <= peak < 60_000_000


def test_every_round_has_all_contenders_and_slow_ones_have_fewer():
    class Clock(Contender):
        def __init__(self, name, spent):
            super().__init__(name, nn.Identity())
            self.spent, self.calls = spent, 0

        def call(self, kind, x_ND, grad_ND):
            self.calls += 1
            return self.spent

    fast = [Clock(name, 1.0) for name in ("dense", "ours", "routed")]
    slow, hopeless = Clock("slow", 6.0), Clock("hopeless", 100.0)
    race(
        [*fast, slow, hopeless],
        ("both",),
        lambda: (torch.zeros(1), torch.zeros(1)),
        seconds=0.0,
        fewest=9,
        most=50,
        warm_up=1,
    )
    assert [each.calls for each in (*fast, slow, hopeless)] == [10, 10, 10, 1 + 3 + 3, 1 + 3]
    assert paired(slow, fast[0], "both") == [6.0, 6.0, 6.0]


def test_nobody_always_follows_the_same_contender():
    """Who comes after the dense twin finds the cache that it leaves, say."""
    called = []

    class Caller(Contender):
        def call(self, kind, x_ND, grad_ND):
            called.append(self.name)
            return 1.0

    contenders = [Caller(name, nn.Identity()) for name in "abcd"]
    batch = (torch.zeros(1), torch.zeros(1))
    race(contenders, ("both",), lambda: batch, seconds=0.0, fewest=20, most=20, warm_up=0)
    rounds = [called[i : i + 4] for i in range(0, len(called), 4)]
    assert all(sorted(each) == list("abcd") for each in rounds)
    followed = {name: set() for name in "abcd"}
    for one, other in (pair for each in rounds for pair in itertools.pairwise(each)):
        followed[one].add(other)
    assert all(len(others) == 3 for others in followed.values())


def test_quartiles():
    assert quartiles([4.0, 1.0, 3.0, 2.0, 5.0]) == [2.0, 3.0, 4.0]
    assert quartiles([7.0]) == [7.0, 7.0, 7.0]


def test_shapes_have_names_of_their_own():
    every = shapes.grid()
    assert len({shape.name for shape in every}) == len(every)
    assert set(shapes.quick()) <= set(every)


def with_ratio(record, shape, ratio):
    """Return the record as if it were of a shape where the layer takes ``ratio`` of dense."""
    copied = json.loads(json.dumps(record))
    copied["shape"] = vars(shape)
    copied["contenders"]["ecomoe"]["both"]["over_dense"] = [ratio, ratio, ratio]
    return {shape.name: copied}


def test_an_aim_is_met_or_missed_by_what_was_measured(record):
    met = aims.verdicts(with_ratio(record, LARGE, 1.09), MACHINES)[0]
    assert (met.met, met.measured, met.reason) == (True, "1.09", "")
    missed = aims.verdicts(with_ratio(record, LARGE, 1.3), MACHINES)[0]
    assert (missed.met, missed.measured) == (False, "1.30")
    assert "must move" in missed.reason


def test_a_peer_counts_by_paired_time(record):
    records = with_ratio(record, LARGE, 1.0)
    of_peer = {"over_dense": [2.0] * 3, "over_ecomoe": [0.8] * 3}
    contenders = records[LARGE.name]["contenders"]
    contenders["grouped_mm"] = {"forward": of_peer, "both": of_peer}
    assert aims.best_peer(records[LARGE.name], "both") == ("grouped_mm", 1.25)
    found = {each.aim: each for each in aims.verdicts(records, MACHINES)}
    worst = found["time over the best lossless peer's at most 1.05 at every shape"]
    assert worst.met is False
    assert "1.25 at n4096" in worst.reason


def test_shapes_that_an_aim_speaks_of_and_nobody_measured_are_named(record):
    found = aims.verdicts(with_ratio(record, LARGE, 1.0), MACHINES)
    (rest,) = [each for each in found if each.met is None]
    assert "4,096 tokens and more, D >= 512, 16 experts, top-2" in rest.aim
    assert rest.measured == "1 of 24 measured"
    assert rest.reason.startswith("23 to measure: `python -m tests.benchmarks.layer --shape ")
    # The command takes in all of them, and nothing that the aim does not speak of.
    parts = rest.reason.strip("`").split(" --shape ")[1:]
    chosen = [shape for shape in shapes.grid() if any(part in shape.name for part in parts)]
    (limit,) = [limit for limit in aims.LIMITS if limit.which in rest.aim]
    assert chosen == [shape for shape in shapes.grid() if limit.holds(shape)]


def test_the_peer_of_the_issue_stands_beside_a_figure(record):
    records = with_ratio(record, FEW, 1.7)
    contenders = records[FEW.name]["contenders"]
    both = {"over_dense": [2.3] * 3, "over_ecomoe": [1.4] * 3}
    contenders["grouped_mm"] = {"forward": both, "both": both}
    assert aims.verdicts(records, MACHINES)[0].measured == "1.70 (`grouped_mm` 2.30)"


def test_shares_below_nothing_and_before_the_schedule_are_explained(record):
    records = with_ratio(record, LARGE, 1.0)
    records[LARGE.name]["contenders"]["routed"]["both"]["over_ecomoe"] = [1.02] * 3
    del records[LARGE.name]["schedule_seconds"]
    found = next(each for each in aims.verdicts(records, MACHINES) if each.aim[:6] == "router")
    assert found.measured == (
        "-2.0% to -2.0%, 1 of 1 within (a share below 0 is noise of the two timings); 1 were "
        "measured before the schedule was timed and hold router and losses alone"
    )


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_hard_shape_of_few_tokens_has_one_limit_in_both_dtypes(record, dtype):
    shape = replace(FEW, dtype=dtype)
    for ratio, met in ((1.59, True), (1.61, False)):
        found = aims.verdicts(with_ratio(record, shape, ratio), MACHINES)[0]
        assert (found.aim[:43], found.met) == ("forward + backward over dense at most 1.6: ", met)


def test_experts_have_to_be_flat_by_each_way_of_telling(record):
    def verdict(over_dense, seconds):
        records = {**with_ratio(record, LONG, 1.0), **with_ratio(record, MANY, over_dense)}
        for name, spent in ((LONG.name, 1.0), (MANY.name, seconds)):
            records[name]["contenders"]["ecomoe"]["both"]["seconds"] = [spent] * 3
        found = aims.verdicts(records, MACHINES)
        return next(each for each in found if each.aim.startswith("256 experts over 16"))

    assert verdict(1.4, 1.4).met
    assert not verdict(1.6, 1.4).met
    assert not verdict(1.4, 1.6).met


def test_bytes_and_router_are_judged_at_few_tokens_too(record):
    few = replace(FEW, tokens=16)
    records = {**with_ratio(record, LARGE, 1.0), **with_ratio(record, few, 1.0)}
    for name, saved, rest in ((LARGE.name, 1.0, 0.99), (few.name, 3.0, 0.8)):
        contenders = records[name]["contenders"]
        contenders["ecomoe"]["saved_bytes"] = saved * contenders["dense"]["saved_bytes"]
        contenders["routed"]["both"]["over_ecomoe"] = [rest] * 3
        records[name]["schedule_seconds"] = 0.0
    found = {each.aim: each for each in aims.verdicts(records, MACHINES)}
    saved = "bytes saved for backward over dense at most 1.1: "
    assert found[saved + "every shape"].measured == "1.00 to 3.00, 1 of 2 within"
    assert found[saved + "every shape"].met is False
    assert found[saved + "4,096 tokens and more"].met
    router = "router, losses and schedule at most 5% of forward + backward (D >= 512"
    assert found[router + ")"].measured == "1.0% to 20.0%, 1 of 2 within"
    assert found[router + ", 256 tokens and more)"].met


def test_the_schedule_counts_to_the_router(record):
    copied = json.loads(json.dumps(record))
    assert 0.0 < copied["schedule_seconds"] < 1e-2
    copied["contenders"]["routed"]["both"]["over_ecomoe"] = [0.97] * 3
    copied["contenders"]["ecomoe"]["both"]["seconds"] = [2.0] * 3
    copied["schedule_seconds"] = 0.1
    assert aims.router_share(copied) == pytest.approx(0.03 + 0.05)


def test_the_monitors_aim_is_read_from_its_part_of_the_page():
    line = "| inside the monitor's hooks, of a step | **{} %** | 0.3 to 0.4 % |"
    assert aims.monitor_verdict(line.format("0.345")).met
    assert aims.monitor_verdict(line.format("1.2")).met is False
    assert aims.monitor_verdict("").met is None


def test_a_missed_shape_is_listed_with_bytes_and_reason(record):
    records = with_ratio(record, LARGE, 1.3)
    contenders = records[LARGE.name]["contenders"]
    of_peer = {"over_dense": [2.0] * 3, "over_ecomoe": [0.5] * 3}
    contenders["eager"] = {"forward": of_peer, "both": {**of_peer, "over_ecomoe": [2.0] * 3}}
    contenders["ecomoe"]["saved_bytes"] = 2 * contenders["dense"]["saved_bytes"]
    contenders["ecomoe"]["forward"]["seconds"] = [0.5] * 3
    contenders["routed"]["both"]["over_ecomoe"] = [1.0] * 3
    ((shape, missed, reason),) = misses.missed_shapes(records, MACHINES)
    assert shape == aims.described(LARGE)
    assert missed.startswith("1.30 of dense, at most 1.1; 2.00 of `eager` forward, at most 1.05; ")
    assert missed.endswith("saves 2.00 of dense, at most 1.1")
    layer_shape = fit.layer_shape(LARGE)
    work = fit.cost_model.layer_work(layer_shape, tokens=LARGE.tokens, training=False)
    assert f"forward: {work.bytes / 1e6:,.1f} MB must move against" in reason
    assert f"which takes {1e3 * work.bytes / 1e10:,.3g} of 500 ms" in reason
    assert "by the model" in reason
    # Well within every aim, it is not listed.
    contenders["eager"]["forward"] = contenders["eager"]["both"]
    contenders["ecomoe"]["saved_bytes"] = contenders["dense"]["saved_bytes"]
    contenders["ecomoe"]["both"]["over_dense"] = [1.0] * 3
    records[LARGE.name]["schedule_seconds"] = 0.0
    assert list(misses.missed_shapes(records, MACHINES)) == []


def test_a_race_is_won_by_every_one_of_three_seeds():
    def raced(*reached):
        ends = {"dense": {"loss": 1.0}, "ecomoe": {"loss": 1.25}}
        results = [{**ends, "step_over_dense": 1.2, "reached": at} for at in reached]
        runs = {str(seed): {"result": result} for seed, result in enumerate(results)}
        return aims.race_verdicts({"gpt": {"title": "GPT", "runs": runs}})[0]

    assert raced(0.9, 0.95, 1.0).met
    assert not raced(0.9, 0.95).met
    assert not raced(0.9, 0.95, 1.01).met
    lost = raced(0.9, 0.95, None)
    assert lost.measured == "0.90, 0.95, not reached"
    assert lost.reason == "a step takes 1.20 of the twin's; +0.250 nats at its end"


def test_the_routers_are_given_back(record):
    ours = build_ours(SMALL, forced(SMALL))
    router = ours.router
    with layer.decided_beforehand(ours)(torch.randn(64, 16)):
        assert ours.router is not router
        assert ours(torch.randn(64, 16)).requires_grad
    assert ours.router is router
    assert record["contenders"]["routed"]["both"]["rounds"] == 2


def test_page_and_plots_are_made_of_a_record(record):
    results = {
        "machine": {"processor": "a processor", "cores": 2, "threads": 1, "date": "today"},
        "constants": CONSTANTS,
        "layers": with_ratio(record, LARGE, 1.234),
    }
    run = {
        "seed": 0,
        "dense": [{"step": 1, "seconds": 1.0, "loss": 2.0}, {"step": 2, "seconds": 2.0, "loss": 1}],
        "ecomoe": [{"step": 1, "seconds": 1.2, "loss": 1.9}],
        "result": {
            "dense": {"loss": 1.0, "seconds": 2.0},
            "ecomoe": {"loss": 1.9, "seconds": 1.2},
            "step_over_dense": 1.2,
            "reached": None,
        },
    }
    races = {"gpt": {"title": "GPT", "setting": "small", "runs": {"0": run}}}
    text = page.page(results, races)
    assert "1.23 [1.23, 1.23]" in text
    assert "not reached" in text
    assert plots.ratios(results["layers"]).count("<circle") > 1
    assert plots.curves(races["gpt"]).count("<polyline") == 2


def test_page_names_peers_that_were_not_asked_for(record):
    assert "grouped_mm" not in record["contenders"]
    results = {"machine": {}, "constants": CONSTANTS, "layers": with_ratio(record, LARGE, 1.0)}
    results["machine"] = {"processor": "a processor", "cores": 2, "threads": 1, "date": "today"}
    assert "- `grouped_mm` at 1 of 1 shapes: not asked for (`--only`)" in page.page(results, {})


def test_page_has_compiled_forms_where_they_were_measured(record):
    layers = with_ratio(record, LARGE, 1.234)
    results = {
        "machine": {"processor": "a processor", "cores": 2, "threads": 1, "date": "today"},
        "constants": CONSTANTS,
        "layers": layers,
    }
    assert "## Compiled" not in page.page(results, {})
    times = {"ecomoe compiled": 0.8, "grouped_mm compiled": 1.5, "dense compiled": 0.9}
    for found in layers.values():
        for name, time in times.items():
            found["contenders"][name] = {"both": {"over_dense": [time, time, time]}}
    text = page.page(results, {})
    assert "| 0.80 [0.80, 0.80] | 1.50 [1.50, 1.50] | 0.90 [0.90, 0.90] |" in text


def test_a_shape_that_is_measured_compiled_counts_towards_its_own_limit_alone():
    """Past the compiler's limit of graphs, contenders would run as they are."""
    graphs = []

    @torch.compile(backend=lambda graph, _: graphs.append(graph) or graph)
    def earlier(x):
        return x + 1

    for number in (1, 2):
        earlier(torch.ones(1))
        assert len(graphs) == number
        layer.measure(
            SMALL,
            device=torch.device("cpu"),
            seconds=0.0,
            fewest=2,
            most=2,
            compiled=True,
            only=["none"],
        )


def test_page_keeps_what_was_written_by_hand(record, tmp_path):
    results = {
        "machine": {"processor": "a processor", "cores": 2, "threads": 1, "date": "today"},
        "constants": CONSTANTS,
        "layers": with_ratio(record, LARGE, 1.0),
    }
    (tmp_path / "cpu.json").write_text(json.dumps(results))
    out = tmp_path / "benchmarks.md"
    out.write_text("# Old\n\n## Monitor\n\nby hand\n")
    for _ in range(2):
        page.main(
            ["--results", str(tmp_path / "cpu.json"), "--races", str(tmp_path), "--out", str(out)]
        )
    text = out.read_text()
    assert text.startswith("# Benchmarks")
    assert text.count("## Monitor\n\nby hand\n") == 1
    assert "# Old" not in text


def test_no_gpu_is_said_politely(capsys, monkeypatch):
    from tests.benchmarks import gpu

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 1
    assert "no CUDA device is here" in capsys.readouterr().err


def test_constants_measured_beside_the_shapes_are_preferred(record):
    alone = {name: dict(constants) for name, constants in CONSTANTS.items()}
    layers = {
        str(rate): {
            "shape": {"dtype": "fp32"},
            "constants": {**CONSTANTS["fp32"], "flops_per_second": rate},
        }
        for rate in (1e9, 3e9, 7e9)
    }
    results = {"machine": {}, "constants": alone, "layers": layers}
    found = fit.machines_of(results)
    assert found["fp32"].flops_per_second == 3e9
    assert found["bf16"] == MACHINES["bf16"]


def test_a_gpu_is_told_by_the_roofline_alone(record):
    layers = with_ratio(record, LARGE, 1.0) | with_ratio(record, FEW, 1.0)
    of_both = {"flops_per_second": 4e14, "bytes_per_second": 3e12}
    results = {
        "machine": {"processor": "p", "cores": 2, "threads": 1, "date": "today", "gpu": "a GPU"},
        "constants": {"fp32": of_both, "bf16": of_both},
        "layers": layers,
    }
    text = page.page(results, {})
    assert "fp32 400,000 GFLOP/s, 3000.0 GB/s" in text
    assert "Four constants" not in text
    assert "did not see" not in text
