"""Feed-forward blocks of transformers' models, recognised by their classes' names.

Importing this module does not import transformers.
"""

from __future__ import annotations

from torch import nn

from ecomoe.integrations.huggingface_blocks import RULES
from ecomoe.sites import Site, class_rule

# Parts of mixtures of experts that are there already, which share their classes with dense blocks.
OTHER_PLACES = {"experts", "shared_expert", "shared_experts", "shared_mlp"}


def recognise(name: str, module: nn.Module) -> Site | None:
    """Return how a layer takes the place of ``module``, or ``None`` where it is no FFN.

    Args:
        name: The module's name in its model.
        module: Any module.

    Raises:
        Refused: It is an FFN that cannot be token-wise.
    """
    if OTHER_PLACES.intersection(name.split(".")):
        return None
    rule = class_rule(RULES, module, root="transformers")
    return None if rule is None else rule(module)
