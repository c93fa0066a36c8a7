"""The shapes that are measured: a quick set that decides, and a grid around it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

Load = Literal["balanced", "zipf", "one"]


@dataclass(frozen=True)
class Shape:
    """A layer, its input and how the tokens spread over the experts.

    The dense twin of equal active FLOPs has ``top_k * d_hidden`` hidden features.
    """

    tokens: int
    d_model: int
    num_experts: int
    top_k: int
    d_hidden: int
    gated: bool = False
    dtype: Literal["fp32", "bf16"] = "fp32"
    load: Load = "balanced"

    @property
    def name(self) -> str:
        """Name the shape uniquely; results are kept under it."""
        form = "gated" if self.gated else "plain"
        return (
            f"n{self.tokens}-d{self.d_model}-e{self.num_experts}-k{self.top_k}-f{self.d_hidden}"
            f"-{form}-{self.dtype}-{self.load}"
        )


def of_width(tokens: int, d_model: int, num_experts: int, top_k: int) -> Shape:
    """Return a shape whose dense twin is four times as wide as the model."""
    return Shape(tokens, d_model, num_experts, top_k, d_hidden=4 * d_model // top_k)


LARGE = of_width(4096, 512, 16, 2)
FEW = of_width(256, 512, 16, 2)
NARROW = Shape(4096, 192, 64, 2, d_hidden=768)
LONG = of_width(16_384, 512, 16, 2)
MANY = of_width(16_384, 512, 256, 2)


def _forms(shape: Shape) -> list[Shape]:
    return [
        replace(shape, gated=gated, dtype=dtype)
        for dtype in ("fp32", "bf16")
        for gated in (False, True)
    ]


def quick() -> list[Shape]:
    """Return the shapes that the project's aims are stated for."""
    return [
        *_forms(LARGE),
        *_forms(FEW),
        *_forms(NARROW),
        replace(LARGE, gated=True, load="zipf"),
        replace(LARGE, gated=True, load="one"),
        replace(of_width(1, 512, 16, 2), gated=True),
        replace(of_width(16, 512, 16, 2), gated=True),
        LONG,
        MANY,
    ]


def _every() -> Iterator[Shape]:
    yield from quick()
    for d_model in (192, 512, 1024):
        for tokens in (1, 16, 256, 4096, 16_384):
            yield from _forms(of_width(tokens, d_model, 16, 2))
    for num_experts in (4, 16, 64, 256, 512):
        yield from _forms(of_width(4096, 192, num_experts, 2))
        yield from _forms(of_width(256, 192, num_experts, 2))
    for top_k in (1, 2, 4, 8):
        yield from _forms(of_width(4096, 512, 16, top_k))
        yield from _forms(of_width(16_384, 192, 64, top_k))
    for load in ("zipf", "one"):
        for shape in (LARGE, FEW, NARROW):
            yield from (replace(form, load=load) for form in _forms(shape))


def grid() -> list[Shape]:
    """Return every shape: each axis varied around the quick set's shapes."""
    return list(dict.fromkeys(_every()))
