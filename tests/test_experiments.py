"""The paper's experiments: every entry runs, a killed run goes on, measurements are right."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ecomoe import EcoMoE
from ecomoe.ecology.sinks import read_records
from examples.data import Images
from examples.experiments.__main__ import main
from examples.experiments.claims import CLAIMS, FIRST_VERSION
from examples.experiments.data import Library, blocks, relabel
from examples.experiments.measure import evaluate
from examples.experiments.models import GPT, Classifier, ViT, WideResNet, dense_ffn, rotate
from examples.experiments.protocol import Batches, ForcedDeath, moved, steps_at, two_rates
from examples.experiments.records import SCALES
from examples.experiments.registry import EXPERIMENTS
from examples.experiments.runner import build_model, run_experiment, run_folder, run_setting
from examples.experiments.topologies import VARIANTS

SMOKE = SCALES["smoke"]
MOST = 6  # conditions of an entry; all but the largest have fewer


@pytest.fixture(scope="module")
def library():
    return Library([], SMOKE)


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return tmp_path_factory.mktemp("experiments")


def smoke(entry, library, out):
    return run_experiment(
        entry, SMOKE, library, seeds=1, out=out, results=out / "results", conditions=MOST
    )


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_entry_runs(name, library, out):
    entry = EXPERIMENTS[name]
    path = smoke(entry, library, out)
    content = json.loads(path.read_text())
    assert [run["name"] for run in content["runs"]] == [s.name for s in entry.settings][:MOST]
    for run in content["runs"]:
        assert math.isfinite(run["final"]["loss"])
        assert run["history"][-1]["percent"] == 100
        assert [scan["temperature"] for scan in run["temperature_scan"]] == [0.1, 5.0]
        for layer in run["final"]["layers"]:
            assert sum(layer["usage"]["top1"]) == pytest.approx(1, abs=1e-3)
            assert len(layer["accuracy"]) == layer["num_experts"]


def test_the_paper_has_its_entries():
    paper = [entry for entry in EXPERIMENTS.values() if entry.paper]
    assert len(paper) == 19  # the 17 of section 3.5, the temperature scan, the tier flow
    assert len({entry.name for entry in EXPERIMENTS.values()}) == len(EXPERIMENTS)
    for entry in EXPERIMENTS.values():
        assert len({setting.name for setting in entry.settings}) == len(entry.settings)


@pytest.mark.parametrize("name", ["phase-map", "low-e", "e-order", "tiny-high-e"])
def test_names_state_the_e_that_is_run(name):
    for setting in EXPERIMENTS[name].settings:
        printed = float(setting.name.split(",")[0].removeprefix("E="))
        assert setting.control.e == pytest.approx(printed, rel=2e-3)


@pytest.fixture(scope="module")
def killed(library, tmp_path_factory):
    """One run that was killed before its last step and resumed, and the same one undisturbed."""
    tmp_path = tmp_path_factory.mktemp("killed")
    setting = replace(EXPERIMENTS["low-e"].settings[0], effort=2.0)
    samples = library.get("cifar10")

    class Killed(Exception):
        pass

    def kill(step, total, record):
        if step == total - 1:
            raise Killed

    whole = run_setting(setting, SMOKE, samples, seed=3, folder=tmp_path / "whole")
    with pytest.raises(Killed):
        run_setting(setting, SMOKE, samples, seed=3, folder=tmp_path / "killed", on_progress=kill)
    assert (tmp_path / "killed" / "checkpoint.pt").exists()
    torch.rand(5)  # whatever happens in between
    resumed = run_setting(setting, SMOKE, samples, seed=3, folder=tmp_path / "killed")
    return tmp_path, whole, resumed


def test_a_killed_run_goes_on_as_if_it_had_not_been(killed):
    folder, whole, resumed = killed
    for key in ("history", "final", "events", "temperature_scan", "steps"):
        assert resumed[key] == whole[key]
    lines = (folder / "killed" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [4, 8]


def test_a_killed_runs_monitor_goes_on_as_if_it_had_not_been(killed):
    folder, _, _ = killed
    watched = [list(read_records(folder / name / "monitor.jsonl")) for name in ("whole", "killed")]
    assert watched[0] == watched[1]


def test_a_run_that_is_done_is_not_done_again(library, tmp_path):
    setting = EXPERIMENTS["low-e"].settings[0]
    samples = library.get("cifar10")
    folder = run_folder(tmp_path, setting, SMOKE, samples, 0)
    first = run_setting(setting, SMOKE, samples, seed=0, folder=folder)
    again = run_folder(tmp_path, replace(setting, name="other"), SMOKE, samples, 0)
    assert again == folder
    assert run_folder(tmp_path, setting, SMOKE, samples, 1) != folder
    second = run_setting(setting, SMOKE, samples, seed=0, folder=again)
    assert second["wall_seconds"] == first["wall_seconds"]


def test_a_changed_default_is_another_run(library, monkeypatch):
    settings = [
        EXPERIMENTS["low-e"].settings[0],  # with the paper's strength, router and spread
        next(setting for setting in EXPERIMENTS["promise"].settings if setting.strength is None),
        VARIANTS[0],
    ]

    def folders():
        return [run_folder(Path(), s, SMOKE, library.get(s.data), 0) for s in settings]

    def changed():
        return [one != other for one, other in zip(folders(), before, strict=True)]

    before = folders()
    for name, value, expected in (
        ("z_weight", 0.1, [True, True, True]),
        ("strength", 0.5, [False, True, False]),
        ("router", "mlp", [False, True, False]),
        ("top_k", 3, [True, True, False]),
        ("target_e", 0.9, [False, False, False]),
    ):
        with monkeypatch.context() as patch:
            patch.setitem(EcoMoE.__init__.__kwdefaults__, name, value)
            assert changed() == expected, name
    with monkeypatch.context() as patch:
        patch.setattr("ecomoe.moe.STARVATION_WEIGHT", 0.5)
        assert changed() == [False, True, True]
    assert not any(changed())


def test_paper_scale_is_the_papers_architecture():
    scale = SCALES["paper"]
    with torch.device("meta"):
        encoder = WideResNet(depth=scale.depth, widen=scale.widen, features=scale.features)
        gpt = GPT(
            vocabulary=50257,
            layers=scale.layers,
            width=scale.width,
            heads=scale.heads,
            build_ffn=lambda width: dense_ffn(width, 4 * width),
        )
    millions = sum(p.numel() for p in encoder.parameters()) / 1e6
    assert 36.4 < millions < 36.8  # WRN-28-10 has 36.5
    assert len(gpt.blocks) == 8
    assert scale.percents[-9:] == tuple(range(92, 101))
    assert (scale.encoder_lr, scale.expert_lr, scale.weight_decay) == (1e-4, 1e-3, 5e-4)


def test_prototypes_exist_where_the_ortho_sweep_needs_them(library):
    samples = library.get("cifar10")
    for setting in EXPERIMENTS["ortho-cifar10"].settings:
        layer = build_model(setting, SMOKE, samples).head
        assert layer.prototypes is not None
        assert layer.oracle == "prototype"


def test_two_rates_cover_every_parameter_once():
    model = Classifier(WideResNet(depth=10, widen=1, stem=4, features=8), EcoMoE(8, 8))
    optimizer = two_rates(model, encoder_lr=1e-4, expert_lr=1e-3, weight_decay=0.0)
    sizes = [sum(p.numel() for p in group["params"]) for group in optimizer.param_groups]
    assert sum(sizes) == sum(p.numel() for p in model.parameters())
    assert sizes[1] == sum(p.numel() for p in model.head.parameters())


def test_batches_are_a_function_of_the_step():
    images, labels = torch.randn(10, 3, 8, 8), torch.arange(10)
    one, other = (Batches(images, labels, size=4, seed=1, augment=True) for _ in range(2))
    assert one.per_epoch == 2
    for step in (5, 0, 3):
        assert torch.equal(one(step)[0], other(step)[0])
    assert len({*one(0)[1].tolist(), *one(1)[1].tolist()}) == 8


def test_moved_images_are_crops_of_themselves():
    images = torch.arange(2 * 3 * 64.0).view(2, 3, 8, 8)
    moved_images = moved(images, torch.Generator().manual_seed(0))
    assert moved_images.shape == images.shape
    for before, after in zip(images, moved_images, strict=True):
        assert set(after.flatten().tolist()) <= set(before.flatten().tolist())


def test_steps_at_hundredths():
    assert steps_at((1, 50, 100), 10) == {1, 5, 10}


def _images(count=60, classes=3):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(count, 1, 8, 8, generator=generator)
    labels = torch.arange(count) % classes
    names = [str(label) for label in range(classes)]
    return Images("noise", (pixels, labels), (pixels[:30], labels[:30]), names)


def test_more_classes_split_and_fewer_merge():
    images = _images()
    fine = relabel(images, 6)
    assert torch.equal(fine.train[1] // 2, images.train[1])
    assert torch.equal(fine.test[1], fine.train[1][:30])
    coarse = relabel(images, 2)
    assert set(coarse.train[1].tolist()) == {0, 1}
    assert relabel(images, 3) is images


@pytest.mark.parametrize("count", [1, 4])
def test_impossible_class_counts_are_refused(count):
    with pytest.raises(ValueError, match="cannot be made of 3"):
        relabel(_images(), count)


def test_blocks_are_followed_by_their_targets():
    ids = torch.arange(21)
    inputs, targets = blocks(ids, 5)
    assert torch.equal(inputs + 1, targets)
    assert inputs.shape == (4, 5)
    with pytest.raises(ValueError, match="must exceed the context"):
        blocks(ids, 21)


def test_rotation_keeps_length_and_sees_only_distance():
    query, key = torch.randn(2, 1, 8, dtype=torch.float64)
    rotated = rotate(query.expand(6, 8)), rotate(key.expand(6, 8))
    assert torch.allclose(rotated[0].norm(dim=-1), query.norm())
    scores = rotated[0] @ rotated[1].T
    assert torch.allclose(scores.diagonal(2), scores[0, 2])


def test_evaluation_agrees_with_counting_by_hand_and_leaves_no_hook():
    torch.manual_seed(0)
    encoder = torch.nn.Linear(6, 8)
    layer = EcoMoE(8, None, tiers=(2, 1, 1), num_classes=5)
    model = Classifier(encoder, layer)
    inputs, targets = torch.randn(40, 6), torch.randint(5, (40,))
    record = evaluate(model, [(inputs[:25], targets[:25]), (inputs[25:], targets[25:])], labels=5)
    with torch.no_grad():
        features = encoder(inputs)
        routing = layer.router(features, layer.temperature)
        own = layer.experts.all_outputs(features)
        predicted = own[torch.arange(40), routing.expert_ids_NK[:, 0]].argmax(-1)
        logits = model(inputs)
    first = routing.expert_ids_NK[:, 0]
    (found,) = record["layers"]
    for expert in range(4):
        mine = first == expert
        assert found["usage"]["top1"][expert] == pytest.approx(mine.float().mean().item())
        if mine.any():
            right = (predicted[mine] == targets[mine]).float().mean().item()
            assert found["accuracy"][expert] == pytest.approx(right)
    assert record["top1"] == pytest.approx((logits.argmax(-1) == targets).float().mean().item())
    assert sum(map(sum, found["flow"])) == pytest.approx(1)
    assert sum(found["tier_usage"]) == pytest.approx(1)
    assert not any(module._forward_hooks for module in model.modules())


def test_evaluation_counts_patches_and_text():
    torch.manual_seed(0)
    build = {"layers": 1, "width": 8, "heads": 2, "build_ffn": lambda width: EcoMoE(width, 8)}
    vit = ViT(shape=(1, 8, 8), patch=4, classes=3, **build)
    batch = torch.randn(6, 1, 8, 8), torch.tensor([0, 1, 2] * 2)
    assert evaluate(vit, [batch], labels=3)["layers"][0]["num_tokens"] == 24
    gpt = GPT(vocabulary=7, **build)
    ids = torch.randint(7, (4, 10))
    record = evaluate(gpt, [(ids, ids)], labels=7)
    assert record["layers"][0]["num_tokens"] == 40
    assert record["perplexity"] == pytest.approx(math.exp(record["loss"]))


def test_forced_death_holds_an_expert_out_and_lets_go():
    torch.manual_seed(0)
    layer = EcoMoE(8, 8, tiers=(4,))
    death = ForcedDeath(layer, (0.2, 0.6))
    x = torch.randn(64, 8)
    layer(x)
    bias = layer.router.score.bias
    before = bias.detach().clone()
    death(0.1)
    assert torch.equal(bias, before)
    death(0.3)
    layer.eval()
    assert not (layer.router(x, layer.temperature).expert_ids_NK == 0).any()
    assert torch.equal(bias[1:], before[1:])
    held = bias.detach().clone()
    death(0.7)
    assert torch.equal(bias, held)


def test_report_and_evidence_are_made_from_results(library, out, tmp_path, monkeypatch):
    for name in EXPERIMENTS:
        smoke(EXPERIMENTS[name], library, out)
    monkeypatch.setenv("COLUMNS", "200")
    page, plots = tmp_path / "evidence.md", tmp_path / "report.html"
    main(["evidence", "--results", str(out / "results"), "--to", str(page)])
    text = page.read_text()
    assert text.count("| **not yet run** |") == len(CLAIMS) + len(FIRST_VERSION)
    assert text.count("at `smoke` only, which shows no more than that the code runs") == len(CLAIMS)
    # The rules, on what smoke wrote.
    (tmp_path / "small").mkdir()
    for path in (out / "results").glob("*.json"):
        small = path.read_text().replace('"scale":"smoke"', '"scale":"small"')
        (tmp_path / "small" / path.name).write_text(small)
    main(["evidence", "--results", str(tmp_path / "small"), "--to", str(page)])
    text = page.read_text()
    open_claims = [line for line in text.splitlines() if "| **not yet run** |" in line]
    # One needs more class counts than six conditions hold, one needs seeds.
    assert [line.split(" | ")[0] for line in open_claims] == [
        "| 4",
        "| 11",
        "| Task complexity shifts the critical E",
    ]
    assert "| Balance benchmark | `python -m examples.balance_benchmark" in text
    assert text.count("\n| ") > len(CLAIMS)
    for claim in CLAIMS:
        assert f"| {claim.label} | {claim.text} | **" in text
    main(["report", "--results", str(out / "results"), "--html", str(plots)])
    assert plots.read_text().count("<h2>") > len(EXPERIMENTS)


def test_evidence_without_results_names_every_command(tmp_path):
    page = tmp_path / "evidence.md"
    main(["evidence", "--results", str(tmp_path), "--to", str(page)])
    text = page.read_text()
    assert text.count("**not yet run**") == len(CLAIMS) + len(FIRST_VERSION)
    for name in EXPERIMENTS:
        assert f"run {name} --scale small" in text


def test_a_page_is_not_replaced_where_there_is_nothing_to_read(tmp_path, capsys):
    page, results = tmp_path / "evidence.md", tmp_path / "results"
    page.write_text("as it was")
    results.mkdir()
    (results / "low-e-smoke.json").write_text('{"experiment": "low')
    for folder, message in ((tmp_path / "none", "no folder"), (results, "no whole JSON")):
        with pytest.raises(SystemExit):
            main(["evidence", "--results", str(folder), "--to", str(page)])
        assert message in capsys.readouterr().err
        assert page.read_text() == "as it was"
    with pytest.raises(SystemExit):
        main(["report", "--results", str(results), "--html", str(tmp_path / "plots.html")])
    assert "no whole JSON" in capsys.readouterr().err


def test_a_broken_result_is_named(library, tmp_path):
    (tmp_path / "result.json").write_text('{"setting": {"na')
    samples = library.get("cifar10")
    with pytest.raises(ValueError, match=r"result\.json is no whole JSON.*remove it"):
        run_setting(EXPERIMENTS["low-e"].settings[0], SMOKE, samples, seed=0, folder=tmp_path)


def test_the_list_fits_a_terminal(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    main(["list"])
    listed = capsys.readouterr().out
    assert len(listed.splitlines()) < 10 * len(EXPERIMENTS)
    assert "…" not in listed


def test_command_line_lists_and_refuses(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    main(["list"])
    listed = capsys.readouterr().out
    assert all(name in listed for name in EXPERIMENTS)
    for arguments, message in (
        (["run", "low-e", "--seeds", "0"], "must be at least 1"),
        (["run", "low-e", "--data", str(tmp_path)], "without parquet files"),
        (["report", "--results", str(tmp_path)], "holds no results"),
    ):
        with pytest.raises(SystemExit):
            main(arguments)
        assert message in capsys.readouterr().err
