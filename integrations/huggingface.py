"""Feed-forward blocks of transformers' models, recognised by their classes' names.

Importing this module does not import transformers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from ecomoe.convert import Site, class_rule, linear_map
from ecomoe.upcycle import DenseFFN, Projection


def recognise(name: str, module: nn.Module) -> Site | None:
    """Return how a layer takes the place of ``module``, or ``None`` where it is no FFN.

    Args:
        name: The module's name in its model.
        module: Any module.

    Raises:
        Refused: It is an FFN that cannot be token-wise.
    """
    rule = class_rule(RULES, module, root="transformers")
    return None if rule is None else rule(module)


def _projection(linear: Any) -> Projection:
    """Take the weights of a linear map, or of a Conv1D, which holds them transposed."""
    if type(linear).__name__ == "Conv1D":
        return Projection.of(linear.weight.T, linear.bias)
    return linear_map(linear)


def _gpt2_mlp(m: Any) -> Site:
    ffn = DenseFFN(
        up=_projection(m.c_fc),
        down=_projection(m.c_proj),
        activation=m.act,
        output_dropout=m.dropout.p,
    )
    return Site(ffn=ffn)


RULES: dict[str, Callable[..., Site]] = {
    "GPT2MLP": _gpt2_mlp,
}
