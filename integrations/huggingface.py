"""Feed-forward blocks of transformers' models, recognised by their classes' names.

Importing this module does not import transformers.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from ecomoe.sites import Parts, Rule, Site, class_rule, linear_map
from ecomoe.upcycle import Projection


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


def projection(linear: Any) -> Projection:
    """Take the weights of a linear map, or of a Conv1D, which holds them transposed."""
    if type(linear).__name__ == "Conv1D":
        return Projection.of(linear.weight.T, linear.bias)
    return linear_map(linear)


RULES: dict[str, Rule] = {
    "GPT2MLP": Parts(
        up="c_fc", act="act", down="c_proj", output_dropout="dropout", linear=projection
    ),
}
