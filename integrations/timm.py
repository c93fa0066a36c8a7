"""Feed-forward blocks of timm's models, recognised by their classes' names.

Importing this module does not import timm.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ecomoe.convert import ChannelsFirst, Refused, Site, class_rule, linear_map
from ecomoe.moe import EcoMoE
from ecomoe.upcycle import DenseFFN

# Places where timm's FFN classes do another work: mixing tokens or positions, gating channels,
# pooling, predicting.
OTHER_PLACES = {"mlp_tokens", "rel_pos", "shared_rel_pos", "meta_mlp", "se", "attn_pool", "head"}


def recognise(name: str, module: nn.Module) -> Site | None:
    """Return how a layer takes the place of ``module``, or ``None`` where it is no FFN.

    Args:
        name: The module's name in its model.
        module: Any module.

    Raises:
        Refused: It is an FFN that cannot be token-wise.
    """
    rule = class_rule(RULES, module, root="timm")
    if rule is None or OTHER_PLACES.intersection(name.split(".")):
        return None
    return rule(module)


class OnFeatures(nn.Module):
    """A norm of image features (B, H, height, width), applied to rows (S, H)."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x_SH: Tensor) -> Tensor:
        """Normalise rows as if each were one pixel."""
        y: Tensor = self.norm(x_SH[:, :, None, None])
        return y.flatten(1)


def _norm(norm: nn.Module, first: nn.Module) -> nn.Module | None:
    if isinstance(norm, nn.Identity):
        return None
    return OnFeatures(norm) if isinstance(first, nn.Conv2d) else norm


def _layer(first: nn.Module) -> type[EcoMoE]:
    return ChannelsFirst if isinstance(first, nn.Conv2d) else EcoMoE


def _mlp(m: Any) -> Site:
    ffn = DenseFFN(
        up=linear_map(m.fc1),
        down=linear_map(m.fc2),
        activation=m.act,
        norm=_norm(m.norm, m.fc1),
        dropout=m.drop1.p,
        output_dropout=m.drop2.p,
    )
    return Site(ffn=ffn, layer=_layer(m.fc1))


def _glu_mlp(m: Any) -> Site:
    halves = linear_map(m.fc1).split(2)
    ffn = DenseFFN(
        gate=halves[1 if m.gate_last else 0],
        up=halves[0 if m.gate_last else 1],
        down=linear_map(m.fc2),
        activation=m.act,
        norm=_norm(m.norm, m.fc1),
        dropout=m.drop1.p,
        output_dropout=m.drop2.p,
    )
    return Site(ffn=ffn, layer=_layer(m.fc1))


def _swiglu(m: Any) -> Site:
    ffn = DenseFFN(
        gate=linear_map(m.fc1_g),
        up=linear_map(m.fc1_x),
        down=linear_map(m.fc2),
        activation=m.act,
        norm=_norm(m.norm, m.fc1_g),
        dropout=m.drop1.p,
        output_dropout=m.drop2.p,
    )
    return Site(ffn=ffn)


def _conv_mlp(m: Any) -> Site:
    norm = _norm(m.norm, m.fc1)
    ffn = DenseFFN(
        up=linear_map(m.fc1),
        down=linear_map(m.fc2),
        activation=m.act if norm is None else nn.Sequential(norm, m.act),
        dropout=m.drop.p,
    )
    return Site(ffn=ffn, layer=ChannelsFirst)


def _grn(m: Any) -> Site:
    raise Refused(
        "global response norm pools its hidden features over the whole image, so the block cannot "
        "work token by token"
    )


def _gated_mlp(m: Any) -> Site:
    raise Refused("its spatial gating unit mixes tokens, so the block cannot work token by token")


RULES: dict[str, Callable[..., Site]] = {
    "layers.mlp.Mlp": _mlp,
    "layers.mlp.GluMlp": _glu_mlp,
    "layers.mlp.SwiGLU": _swiglu,
    "layers.mlp.ConvMlp": _conv_mlp,
    "layers.mlp.GlobalResponseNormMlp": _grn,
    "layers.mlp.GatedMlp": _gated_mlp,
}
