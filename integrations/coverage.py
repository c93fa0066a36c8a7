"""The page ``docs/coverage.md``, from what became of each model in `ecomoe.integrations.census`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

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
        sensitivity: How far the dense output moves, in the same measure, when the input changes by
            a rounding error; measured where ``difference`` is above `BOUND`.
        double: ``difference`` in fp64; measured where ``sensitivity`` is above `BOUND`.
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
    sensitivity: float = 0.0
    double: float | None = None

    @property
    def agrees(self) -> bool:
        """Whether the model computes what its dense twin does, as exactly as that can be told."""
        return (self.difference if self.double is None else self.double) <= BOUND


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
    "as *run* says. A model above 1e-5 whose dense twin, too, answers a change of its input by",
    "1e-7 with one above 1e-5 is compared in fp64 as well, for fp32 cannot tell more there.",
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
        f"{len(errors)} errors; {_agreement(checked)}."
    )
    for entry in checked:
        if entry.double is not None:
            yield (
                f"{entry.name} differs by {entry.difference:.1e} in fp32, where its dense twin "
                f"answers the change by 1e-7 with one of {entry.sensitivity:.1e}, and by "
                f"{entry.double:.1e} in fp64."
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
        + f"); {len(errors)} errors; {_agreement(entries)}."
    )
    yield ""
    yield "| kind | family | blocks | difference |"
    yield "|---|---|---:|---:|"
    for entry in sorted(entries, key=lambda entry: (entry.group, entry.name)):
        yield f"| {entry.group} | {entry.name} | {_reached(entry)} | {_outcome(entry)} |"
    yield ""
    yield from (f"- {entry.name}: {entry.error}" for entry in errors)


def _agreement(entries: Sequence[Entry]) -> str:
    greatest = max((e.difference for e in entries if e.double is None), default=0.0)
    return f"{sum(e.agrees for e in entries)} agree; greatest difference {greatest:.1e}"


def _reached(entry: Entry | None) -> str:
    if entry is None:
        return ""
    part = f" ({entry.reached} run)" if entry.reached != entry.blocks else ""
    return f"{entry.blocks}{part}"


def _outcome(entry: Entry | None) -> str:
    if entry is None or not entry.checked:
        return ""
    double = "" if entry.double is None else f" (fp64: {entry.double:.1e})"
    return "error" if entry.error else f"{entry.difference:.1e}{double}"
