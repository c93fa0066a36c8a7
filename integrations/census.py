"""Which models of timm and transformers `ecomoe.convert` takes, measured: ``docs/coverage.md``.

``python -m ecomoe.integrations.census`` builds every registered timm model on the meta device and
converts it, and does the same for a tiny random model of every transformers family that
`ecomoe.integrations.tiny` can build. One model of each architecture, at its smallest size, is also
run: converted with exact copies it must compute what its dense twin does, and a training step must
reach every layer with finite gradients. Each is run in a process of its own, which gives its memory
back.
"""

from __future__ import annotations

import argparse
import inspect
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import replace
from fnmatch import fnmatchcase
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import ecomoe
from ecomoe.integrations.coverage import BOUND, Entry, report
from ecomoe.integrations.timm import ecomoe_converted
from ecomoe.integrations.tiny import FAMILIES, inputs_for, tiny_model
from ecomoe.sites import find_blocks

# Few experts, so that the converted models stay small.
SETTINGS: dict[str, Any] = {"tiers": (2, 1, 1), "top_k": 2, "verbose": False}

# A model for images of more than twice this height is run on images of it, where its class takes a
# size; patches of 14 and of 16 divide it.
PIXELS = 224

# Of a model with more parameters only the last two blocks are converted for a run: less memory, and
# fewer layers behind them in which a random model may blow up a rounding error.
MAX_PARAMETERS = 50_000_000


def tensors(output: Any) -> Iterator[Tensor]:
    """Yield the floating tensors in a model's output, whatever its form."""
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, dict):
        for value in output.values():
            yield from tensors(value)
    elif isinstance(output, (list, tuple)):
        for value in output:
            yield from tensors(value)


@torch.no_grad()
def unsettle(model: nn.Module, generator: torch.Generator) -> None:
    """Move constant parameters and statistics off their value.

    A fresh LayerScale of 1e-6, a batch norm of weight 0 or a bias of 0 would hide a mistake.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        constant = tensor.is_floating_point() and tensor.numel() > 1
        if constant and bool((tensor == tensor.flatten()[0]).all()):
            tensor.add_(0.2 * torch.rand(tensor.shape, generator=generator).to(tensor))


def check(model: nn.Module, call: Callable[[nn.Module], Any]) -> tuple[int, int, float]:
    """Convert a model with exact copies and compare it with its dense twin.

    Args:
        model: A model with memory; it is converted.
        call: Runs a model on fixed inputs and returns its output.

    Returns:
        The number of blocks, how many of them a backward pass reached as layers, and the greatest
        difference over the greatest value of an output.

    Raises:
        ValueError: It cannot be converted.
        RuntimeError: No layer was reached, or a gradient is not finite.
    """
    unsettle(model, torch.Generator().manual_seed(0))
    model.eval()
    blocks = len(find_blocks(model)[0])
    with torch.no_grad():
        dense = [y.clone() for y in tensors(call(model))]
    large = sum(p.numel() for p in model.parameters()) > MAX_PARAMETERS
    ecomoe.convert(model, layers=[-2, -1] if large else None, **SETTINGS)
    layers = [m for m in model.modules() if isinstance(m, ecomoe.EcoMoE)]
    if large:
        _freeze_all_but(model, layers)
    with torch.no_grad():
        sparse = list(tensors(call(model)))
    pairs = zip(sparse, dense, strict=True)
    difference = max(_relative_difference(got, want) for got, want in pairs)
    model.train()
    outputs = [y for y in tensors(call(model)) if y.requires_grad]
    loss = torch.stack([y.float().square().mean() for y in outputs]).sum()
    (loss + ecomoe.aux_loss(model)).backward()
    reached = 0
    for layer in layers:
        gradients = [p.grad for p in (*layer.router.parameters(), *layer.experts.parameters())]
        present = [gradient for gradient in gradients if gradient is not None]
        if not all(gradient.isfinite().all() for gradient in present):
            raise RuntimeError("a gradient is not finite")
        reached += len(present) == len(gradients)
    if not reached:
        raise RuntimeError("no layer was called and its output used")
    return blocks, reached, difference


def _freeze_all_but(model: nn.Module, layers: Sequence[nn.Module]) -> None:
    trained = {id(p) for layer in layers for p in layer.parameters() if p.requires_grad}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in trained)


def _relative_difference(got: Tensor, want: Tensor) -> float:
    if not want.numel():
        return 0.0
    finite = want.isfinite()  # masked logits are -inf in both
    if not torch.equal(got[~finite], want[~finite]) and not got[~finite].isnan().all():
        return float("inf")
    if not finite.any():
        return 0.0
    scale = want[finite].abs().max()
    return float((got[finite] - want[finite]).abs().max() / scale.clamp_min(1e-30))


def survey(name: str, group: str, model: nn.Module) -> Entry:
    """Convert a model, on the meta device or not, and say what became of it."""
    try:
        found, refused = find_blocks(model)
        reasons = tuple(dict.fromkeys(refused.values()))
        if found:
            ecomoe.convert(model, **SETTINGS)
    except Exception as problem:
        return Entry(name, group, error=_line(problem))
    return Entry(name, group, blocks=len(found), refused=reasons)


def _line(problem: Exception) -> str:
    text = " ".join(str(problem).split())
    return f"{type(problem).__name__}: {text[:160]}"


# timm


def survey_timm(only: str = "*") -> Iterator[Entry]:
    """Build and convert every registered model of timm on the meta device."""
    import timm

    for name in timm.list_models():
        if fnmatchcase(name, only) and name != ecomoe_converted.__name__:
            group = timm.model_entrypoint(name).__module__.rpartition(".")[2]
            with torch.device("meta"):
                model = timm.create_model(name)
            cost = _input_size(model)[-1] ** 2 * sum(p.numel() for p in model.parameters())
            yield replace(survey(name, group, model), cost=cost)


def check_timm(entry: Entry) -> Entry:
    """Run one timm model beside its dense twin."""
    try:
        model, x = _build(entry.name)
        blocks, reached, difference = check(model, lambda m: m(x))
        entry = replace(entry, blocks=blocks, reached=reached, difference=difference)
        if difference > BOUND:
            model, x = _build(entry.name)
            entry = replace(entry, sensitivity=sensitivity(model, x))
        if entry.sensitivity > BOUND:
            _, _, difference = check(model.double(), lambda m: m(x.double()))
            entry = replace(entry, double=difference)
    except Exception as problem:
        entry = replace(entry, error=_line(problem))
    return replace(entry, checked=True)


def _build(name: str) -> tuple[nn.Module, Tensor]:
    import timm

    with torch.device("meta"):
        size = _input_size(timm.create_model(name))
    if size[-1] > 2 * PIXELS:
        with suppress(TypeError):  # not every model takes a size
            torch.manual_seed(0)
            model = timm.create_model(name, img_size=PIXELS)
            return model, torch.randn(2, size[0], PIXELS, PIXELS)
    torch.manual_seed(0)
    return timm.create_model(name), torch.randn(2, *size)


@torch.no_grad()
def sensitivity(model: nn.Module, x: Tensor) -> float:
    """Return how far a dense model's output moves when its input changes by a rounding error."""
    unsettle(model, torch.Generator().manual_seed(0))
    model.eval()
    pairs = zip(tensors(model(x)), tensors(model(x * (1 + 1e-7))), strict=True)
    return max(_relative_difference(got, want) for got, want in pairs)


def _input_size(model: Any) -> tuple[int, ...]:
    sizes = [
        model.default_cfg[k] for k in ("input_size", "test_input_size") if k in model.default_cfg
    ]
    return min((tuple(size) for size in sizes if size), key=lambda size: size[-1])


def smallest(entries: Sequence[Entry]) -> list[Entry]:
    """Return of each of timm's modules the convertible model that is cheapest to run."""
    best: dict[str, Entry] = {}
    for entry in sorted(entries, key=lambda entry: entry.cost):
        if entry.blocks:
            best.setdefault(entry.group, entry)
    return [entry for _, entry in sorted(best.items())]


# transformers


def check_family(entry: Entry) -> Entry:
    """Convert and run a tiny random model of a family of transformers, named by its entry."""
    torch.manual_seed(0)
    try:
        model = tiny_model(entry.name)
        entry = replace(entry, group=kind(model))
        inputs = inputs_for(model)
        refused = tuple(dict.fromkeys(find_blocks(model)[1].values()))

        def call(m: nn.Module) -> Any:
            torch.manual_seed(0)  # masked autoencoders draw their mask
            return m(**inputs)

        blocks, reached, difference = check(model, call)
        entry = replace(
            entry, blocks=blocks, reached=reached, refused=refused, difference=difference
        )
    except Exception as problem:
        entry = replace(entry, error=_line(problem))
    return replace(entry, checked=True)


def kind(model: Any) -> str:
    """Return what kind of family a transformers model is of."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    accepted = inspect.signature(model.forward).parameters
    features = {"pixel_values", "input_values", "input_features"}.intersection(accepted)
    if features and "input_ids" in accepted:
        return "multimodal"
    if features:
        return "vision" if "pixel_values" in features else "audio"
    if model.config.is_encoder_decoder:
        return "encoder-decoder"
    return "decoder" if type(model.config) in MODEL_FOR_CAUSAL_LM_MAPPING else "encoder"


# The command


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the census and write its report; return 1 if a model failed or does not agree."""
    parser = argparse.ArgumentParser(
        prog="python -m ecomoe.integrations.census", description=main.__doc__
    )
    parser.add_argument("--output", type=Path, default=Path("docs/coverage.md"))
    parser.add_argument("--timm", default="*", help="a glob on names of timm models")
    parser.add_argument("--families", default="*", help="a glob on names of transformers families")
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    registered, runs, families = [], [], []
    for entry in survey_timm(options.timm):
        registered.append(entry)
        _show(entry)
    for entry in smallest(registered):
        runs.append(_in_fresh_process(check_timm, entry))
        _show(runs[-1])
    for model_type in FAMILIES:
        if fnmatchcase(model_type, options.families):
            families.append(_in_fresh_process(check_family, Entry(model_type, "")))
            _show(families[-1])
    options.output.write_text(report(registered, runs, families) + "\n")
    return int(any(e.error or not e.agrees for e in (*registered, *runs, *families)))


def _in_fresh_process(run: Callable[[Entry], Entry], entry: Entry) -> Entry:
    """Return ``run(entry)``; a process that dies, of want of memory say, is that entry's error."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["ecomoe", "timm", "transformers"])
    with ProcessPoolExecutor(1, context) as process:
        try:
            return process.submit(_quietly, run, entry).result()
        except BrokenProcessPool as problem:
            return replace(entry, error=_line(problem), checked=True)


def _quietly(run: Callable[[Entry], Entry], entry: Entry) -> Entry:
    warnings.simplefilter("ignore")
    return run(entry)


def _show(entry: Entry) -> None:
    outcome = entry.error or f"{entry.blocks} blocks"
    difference = f", {entry.difference:.1e}" if entry.checked and not entry.error else ""
    print(f"{entry.group} {entry.name}: {outcome}{difference}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
