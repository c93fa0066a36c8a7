"""Which models of timm and transformers `ecomoe.convert` takes, measured: ``docs/coverage.md``.

``python -m ecomoe.integrations.census`` builds every registered timm model on the meta device and
converts it, and does the same for a tiny random model of every transformers family that
`ecomoe.integrations.tiny` can build. One model of each architecture, at its smallest size, is also
run: converted with exact copies it must compute what its dense twin does, and a training step must
reach every layer with finite gradients.
"""

from __future__ import annotations

import argparse
import inspect
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import ecomoe
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

# What exact copies may differ by in fp32.
BOUND = 1e-5


@dataclass(frozen=True)
class Entry:
    """What became of one model.

    Attributes:
        name: The model, or transformers' model type.
        group: timm's module, or the kind of family.
        blocks: Feed-forward blocks replaced.
        reached: Of these, how many a run reached with gradients: of a large model only two are
            run, and a part of a multimodal model may have got no input.
        cost: Parameters times pixels, to tell which model of a group is cheapest to run.
        refused: Why other blocks, or all, were refused; each reason once.
        error: An exception's text, or "".
        checked: Whether it was run beside its dense twin.
        difference: Greatest absolute difference from the dense output over its greatest value.
        double: Whether that is in fp64, for the model blows up rounding errors of its own.
    """

    name: str
    group: str
    blocks: int = 0
    reached: int = 0
    cost: int = 0
    refused: tuple[str, ...] = field(default_factory=tuple)
    error: str = ""
    checked: bool = False
    difference: float = 0.0
    double: bool = False


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
    double = False
    try:
        model, x = _build(entry.name)
        blocks, reached, difference = check(model, lambda m: m(x))
        if difference > BOUND:
            model, x = _build(entry.name)
            double = sensitivity(model, x) > BOUND
        if double:
            _, _, difference = check(model.double(), lambda m: m(x.double()))
    except Exception as problem:
        return replace(entry, error=_line(problem), checked=True)
    return replace(
        entry,
        blocks=blocks,
        reached=reached,
        checked=True,
        difference=difference,
        double=double,
    )


def _build(name: str) -> tuple[nn.Module, Tensor]:
    import timm

    torch.manual_seed(0)
    model: Any = timm.create_model(name)
    size = _input_size(model)
    if size[-1] > 2 * PIXELS:
        with suppress(TypeError):  # not every model takes a size
            model = timm.create_model(name, img_size=PIXELS)
            size = (size[0], PIXELS, PIXELS)
    return model, torch.randn(2, *size)


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


def check_transformers(model_type: str) -> Entry:
    """Convert and run a tiny random model of a family."""
    entry = Entry(model_type, "")
    torch.manual_seed(0)
    try:
        model = tiny_model(model_type)
        entry = replace(entry, group=kind(model))
        inputs = inputs_for(model)
        refused = tuple(dict.fromkeys(find_blocks(model)[1].values()))

        def call(m: nn.Module) -> Any:
            torch.manual_seed(0)  # masked autoencoders draw their mask
            return m(**inputs)

        blocks, reached, difference = check(model, call)
    except Exception as problem:
        return replace(entry, error=_line(problem), checked=True)
    return replace(
        entry,
        blocks=blocks,
        reached=reached,
        refused=refused,
        checked=True,
        difference=difference,
    )


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


# The report


def report(
    timm_entries: Sequence[Entry], checked: Sequence[Entry], families: Sequence[Entry]
) -> str:
    """Write the tables of ``docs/coverage.md``."""
    return "\n".join(
        [*_INTRODUCTION, *_timm_table(timm_entries, checked), *_family_table(families)]
    )


_INTRODUCTION = (
    "# Which models convert",
    "",
    "Written by `python -m ecomoe.integrations.census`; do not edit. *Difference* is the greatest",
    "absolute difference between the output of the converted model, with experts that are exact",
    "copies, and that of its dense twin, over the greatest value of the dense output; fp32, random",
    "weights, batch norms and layer scales moved off their initial values. A model that was run",
    "also did a backward pass, which reached the routers and experts of all blocks, or of as many",
    "as *run* says. Where the dense model itself answers a change of its input by 1e-7 with one of",
    "more than 1e-5, the two are compared in fp64.",
    "",
)


def _timm_table(entries: Sequence[Entry], checked: Sequence[Entry]) -> Iterator[str]:
    import timm

    converted = sum(entry.blocks > 0 for entry in entries)
    errors = [entry for entry in (*entries, *checked) if entry.error]
    yield f"## timm {timm.__version__}"
    yield ""
    yield (
        f"{converted} of {len(entries)} registered models convert; {len(checked)} were run; "
        f"{len(errors)} errors; greatest difference "
        f"{max((e.difference for e in checked), default=0.0):.1e}."
    )
    yield ""
    yield "| module | models | converted | run | blocks | difference | refused |"
    yield "|---|---:|---:|---|---:|---:|---|"
    runs = {entry.group: entry for entry in checked}
    groups: dict[str, list[Entry]] = {}
    for entry in entries:
        groups.setdefault(entry.group, []).append(entry)
    nothing = []
    for group, members in sorted(groups.items()):
        count = sum(entry.blocks > 0 for entry in members)
        refused = "; ".join(dict.fromkeys(r for entry in members for r in entry.refused))
        if not count and not refused:
            nothing.append(f"{group} ({len(members)})")
            continue
        run = runs.get(group)
        yield (
            f"| {group} | {len(members)} | {count} | {run.name if run else ''} | "
            f"{_reached(run)} | {_outcome(run)} | {refused} |"
        )
    yield ""
    yield "No feed-forward block, by module (models): " + ", ".join(nothing) + "."
    yield ""
    yield from (f"- {entry.name}: {entry.error}" for entry in errors)


def _family_table(entries: Sequence[Entry]) -> Iterator[str]:
    import transformers

    errors = [entry for entry in entries if entry.error]
    kinds = Counter(entry.group for entry in entries if not entry.error)
    yield f"## transformers {transformers.__version__}"
    yield ""
    yield (
        f"{len(entries) - len(errors)} families convert and were run as tiny random models ("
        + ", ".join(f"{count} {name}" for name, count in sorted(kinds.items()))
        + f"); {len(errors)} errors; greatest difference "
        f"{max((e.difference for e in entries), default=0.0):.1e}."
    )
    yield ""
    yield "| kind | family | blocks | difference |"
    yield "|---|---|---:|---:|"
    for entry in sorted(entries, key=lambda entry: (entry.group, entry.name)):
        yield f"| {entry.group} | {entry.name} | {_reached(entry)} | {_outcome(entry)} |"
    yield ""
    yield from (f"- {entry.name}: {entry.error}" for entry in errors)


def _reached(entry: Entry | None) -> str:
    if entry is None:
        return ""
    part = f" ({entry.reached} run)" if entry.reached != entry.blocks else ""
    return f"{entry.blocks}{part}"


def _outcome(entry: Entry | None) -> str:
    if entry is None or not entry.checked:
        return ""
    return "error" if entry.error else f"{entry.difference:.1e}{' (fp64)' * entry.double}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the census and write its report; return 1 if there was an error."""
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
        runs.append(check_timm(entry))
        _show(runs[-1])
    for model_type in FAMILIES:
        if fnmatchcase(model_type, options.families):
            families.append(check_transformers(model_type))
            _show(families[-1])
    options.output.write_text(report(registered, runs, families) + "\n")
    return int(any(entry.error for entry in (*registered, *runs, *families)))


def _show(entry: Entry) -> None:
    outcome = entry.error or f"{entry.blocks} blocks"
    difference = f", {entry.difference:.1e}" if entry.checked and not entry.error else ""
    print(f"{entry.group} {entry.name}: {outcome}{difference}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
