"""Time the layer beside its peers on a GPU: ``python -m tests.benchmarks.gpu``.

Takes the options of `tests.benchmarks.layer`; measures whole training steps too.
"""

from __future__ import annotations

import sys

import torch

from tests.benchmarks import layer, models


def main(arguments: list[str] | None = None) -> int:
    """Measure on the first CUDA device; return the exit status."""
    arguments = ["--device", "cuda", *(sys.argv[1:] if arguments is None else arguments)]
    parser = layer.options("python -m tests.benchmarks.gpu")
    given = parser.parse_args(arguments)
    if not given.list and not torch.cuda.is_available():
        print(
            "no CUDA device is here: run this on a machine with one, or "
            "`python -m tests.benchmarks.layer` for the CPU",
            file=sys.stderr,
        )
        return 1
    layer.run(parser, given)
    if not given.list:
        kept = [] if given.out is None else ["--out", str(given.out)]
        models.main(["--device", "cuda", *kept])
    return 0


if __name__ == "__main__":
    sys.exit(main())
