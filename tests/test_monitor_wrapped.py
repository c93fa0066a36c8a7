"""The monitor on models in wrappers: compiled, LoRA, DDP, FSDP2."""

import monitor_ranks
import pytest
import torch
from families import tiny_model
from ranks import Ranks

import ecomoe
from ecomoe.ecology.sinks import read_records


@pytest.fixture(scope="module")
def ranks():
    ranks = Ranks(2)
    yield ranks
    ranks.stop()


@pytest.mark.parametrize("how", ["ddp", "ddp-inner", "fsdp"])
def test_two_processes_report_what_one_would(ranks, how, tmp_path):
    log = tmp_path / "two.jsonl"
    found = ranks.run(monitor_ranks.run_wrapped, how, log)
    alone = monitor_ranks.run_alone(tmp_path / "one.jsonl")
    for eval_report, train_report in found:
        assert eval_report["counts"] == alone[0]["counts"]
        assert eval_report["accuracy"] == alone[0]["accuracy"]
        assert eval_report["metrics"] == pytest.approx(alone[0]["metrics"], rel=1e-4)
        assert train_report["counts"] == alone[1]["counts"]
        # The tokens of the first batch of each process; alone there was one first batch of 20.
        assert eval_report["redundancy"] == found[0][0]["redundancy"]
        assert eval_report["redundancy"]["probes"] == 40
        assert alone[0]["redundancy"]["probes"] == 20
    # One process writes, once a report.
    steps = [(record["step"], record["phase"]) for record in read_records(log)]
    assert steps == [(2, "train"), (3, "train"), (3, "eval")]


def test_evaluation_on_the_first_process_alone(ranks, tmp_path):
    log = tmp_path / "run.jsonl"
    reports = ranks.run(monitor_ranks.run_evaluating_on_the_first_alone, log)
    for report in (*reports[0], *reports[1]):
        report["layers"][0].pop("auxiliary")  # of each process's own last call
    assert reports[0] == reports[1]
    evaluated, trained = (report["layers"][0] for report in reports[0])
    assert (evaluated["num_tokens"], trained["num_tokens"]) == (20, 80)
    assert sum(evaluated["judged"]) == evaluated["redundancy"]["probes"] == 20
    assert evaluated["specialisation"] == evaluated["specialisation_by"]["domain"] is not None
    assert evaluated["lockdown"]["saturation"] == 1
    found = [(r["step"], r["phase"]) for r in read_records(log)]
    assert found == [(2, "train"), (2, "eval"), (4, "train"), (4, "eval")]


@pytest.mark.parametrize("by_rank", [True, False])
@pytest.mark.parametrize("stop", [4, 5])
def test_two_processes_resume_to_the_same_history(ranks, tmp_path, stop, by_rank):
    whole = ranks.run(monitor_ranks.run_resumed, tmp_path / "whole.jsonl", None, by_rank)
    parts = ranks.run(monitor_ranks.run_resumed, tmp_path / "parts.jsonl", stop, by_rank)
    assert parts == whole
    assert list(read_records(tmp_path / "parts.jsonl")) == list(
        read_records(tmp_path / "whole.jsonl")
    )
    assert len(whole[0][0]["layers"][0]["lockdown"]["overlaps"]) == 2


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_training_of_two_processes_is_bit_equal_and_counted_exactly(ranks, how):
    watched = ranks.run(monitor_ranks.run_training, how, True)
    plain = ranks.run(monitor_ranks.run_training, how, False)
    for (weights, executed, counts, left), (expected, *_) in zip(watched, plain, strict=True):
        assert weights == expected
        assert counts == executed
        assert sum(counts) == 2 * 2 * 20 * monitor_ranks.STEPS
        assert left == 0


def test_failing_rank_leaves_no_one_waiting(ranks):
    assert ranks.run(monitor_ranks.run_failing_on_the_first_alone) == [True, True]


@pytest.mark.parametrize("at_close", [False, True])
def test_failure_of_one_ranks_monitor_ends_the_watching_of_all(ranks, at_close):
    (first, *of_first), (second, *of_second) = ranks.run(
        monitor_ranks.run_with_a_failing_monitor, at_close
    )
    assert len(first) == len(second) == 1
    assert "the training goes on: TypeError" in first[0]
    assert "stopped watching after an error in another process" in second[0]
    # The hooks of the others stay until the next report, which is the last one here.
    steps = [2, 4, 6] if at_close else [2]
    assert of_first == [steps, False]
    assert of_second == [steps, at_close]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_compiled_wrapper():
    torch.compiler.reset()
    torch.manual_seed(0)
    model = monitor_ranks.Model()
    compiled = torch.compile(model, backend="aot_eager")
    x, y = monitor_ranks.batch(0, rank=0)
    with ecomoe.Monitor(compiled) as monitor:
        compiled(x).sum().backward()
        model.eval()
        with torch.no_grad():
            monitor.evaluate(outputs=compiled(x), targets=y)
        (layer,) = monitor.report("train").to_dict()["layers"]
        assert layer["num_tokens"] == 20
        report = monitor.report("eval").to_dict()
    assert report["layers"][0]["num_tokens"] == 20
    assert sum(report["layers"][0]["judged"]) == 20
    assert report["metrics"]["judged"] == 20


@pytest.mark.filterwarnings("ignore")
def test_lora_on_routers_and_experts():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=2,
        target_modules=["q_proj"],
        target_parameters=["mlp.gate.weight", "mlp.experts.gate_up_proj"],
    )
    model = peft.get_peft_model(tiny_model("mixtral"), config)
    ids = torch.randint(1, 60, (2, 6))
    with ecomoe.Monitor(model) as monitor:
        model(input_ids=ids).last_hidden_state.sum().backward()
        layers = monitor.report("train").to_dict()["layers"]
    assert [layer["name"].split("model.")[-1] for layer in layers] == [
        f"layers.{i}.mlp" for i in range(3)
    ]
    assert all(layer["num_tokens"] == 12 and layer["verified"] for layer in layers)
