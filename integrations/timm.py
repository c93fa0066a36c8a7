"""timm: which modules are feed-forward blocks, and how converted models are saved and loaded.

Importing this module does not import timm.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from ecomoe.convert import rebuild
from ecomoe.sites import Parts, Refused, Rule, Site, class_rule

# Places where timm's FFN classes do another work: mixing tokens or positions, gating channels,
# pooling, predicting.
OTHER_PLACES = (
    "attn.attn",
    "attn_pool",
    "head",
    "meta_mlp",
    "mlp_add",
    "mlp_scale",
    "mlp_tokens",
    "rel_pos",
    "se",
    "shared_rel_pos",
)


Sites = Site | tuple[Site, ...] | None


def recognise(name: str, module: nn.Module) -> Sites:
    """Return how a layer takes the place of ``module``, or ``None`` where it is no FFN.

    Args:
        name: The module's name in its model.
        module: Any module.

    Raises:
        Refused: It is an FFN that cannot be token-wise.
    """
    if any(f".{place}." in f".{name}." for place in OTHER_PLACES):
        return None
    rule = class_rule(RULES, module, root="timm")
    return None if rule is None else rule(module)


def _refuse(reason: str) -> Rule:
    def rule(module: Any) -> Sites:
        raise Refused(reason)

    return rule


_GRN = _refuse(
    "its global response norm pools hidden features over the whole image, so it cannot work token "
    "by token"
)
_GATING = _refuse("its spatial gating unit mixes tokens, so it cannot work token by token")
_FUSED = _refuse("it computes attention and feed-forward in the same linear maps")


def _convs(first: str, norm: str, act: str, last: str, *, dropout: str | None = None) -> Parts:
    """Return the rule for two linear maps with a batch norm each, of which the second stays."""
    emptied = (norm, act, last) if dropout is None else (norm, act, last, dropout)
    return Parts(up=first, act=(norm, act), down=last, dropout=dropout, seat=first, emptied=emptied)


def _glu_mlp(m: Any) -> Sites:
    return Parts(
        up="fc1",
        packed="gate last" if m.gate_last else "gate first",
        act="act",
        dropout="drop1",
        norm="norm",
        down="fc2",
        output_dropout="drop2",
    )(m)


def _conv_mlp_with_norm(m: Any) -> Sites:
    if m.drop.p:
        raise Refused(f"its dropout of {m.drop.p} follows a norm of the output; set it to 0 first")
    return _convs("fc1", "norm1", "act", "fc2")(m)


def _conv_mlp_with_mid(m: Any) -> Sites:
    if isinstance(m.mid, nn.Identity):
        return _convs("fc1.conv", "fc1.bn", "drop1", "fc2.conv")(m)
    return Parts(down="fc2.conv", seat="fc2.conv")(m)


def _spatial_mlp(m: Any) -> Sites:
    if m.conv2 is not None:
        raise Refused("its second convolution spans several pixels")
    return Parts(up="conv1", act="act1", down="conv3", dropout="drop1", output_dropout="drop3")(m)


def _residual_mlp(path: str) -> Rule:
    """Return the rule for a sequence of norm, linear map, activation, linear map, dropout."""

    def rule(m: Any) -> Sites:
        if isinstance(m.get_submodule(path.partition(".")[0]), nn.Identity):
            return None
        first, act, last = (f"{path}.{i}" for i in (1, 2, 3))
        return Parts(up=first, act=act, down=last, seat=first, emptied=(act, last))(m)

    return rule


def _gemma4_mlp(m: Any) -> Sites:
    if m.gate_proj.use_clipped:
        raise Refused("its linear maps clamp their inputs and outputs")
    return Parts(
        gate="gate_proj.linear",
        up="up_proj.linear",
        act="act",
        down="down_proj.linear",
        output_dropout="drop",
    )(m)


_CONV_MLP = Parts(up="fc1", act=("norm", "act"), down="fc2", dropout="drop")
_POINTWISE_CONVS = Parts(
    up="pwconv1", act="act", down="pwconv2", seat="pwconv1", emptied=("act", "pwconv2")
)
_RDNET = Parts(
    up="layers.2",
    act="layers.3",
    down="layers.4",
    seat="layers.2",
    emptied=("layers.3", "layers.4"),
)

RULES: dict[str, Rule] = {
    "layers.mlp.Mlp": Parts(
        up="fc1",
        act="act",
        dropout="drop1",
        norm="norm",
        down="fc2",
        output_dropout="drop2",
    ),
    "layers.mlp.SwiGLU": Parts(
        gate="fc1_g",
        up="fc1_x",
        act="act",
        dropout="drop1",
        norm="norm",
        down="fc2",
        output_dropout="drop2",
    ),
    "layers.mlp.GluMlp": _glu_mlp,
    "layers.mlp.ConvMlp": _CONV_MLP,
    "layers.mlp.GlobalResponseNormMlp": _GRN,
    "layers.mlp.GatedMlp": _GATING,
    "csatv2.Block": _GRN,
    "cpubone.CPUBoneBlock": _residual_mlp("total.0.1.main"),
    "efficientformer.ConvMlpWithNorm": _conv_mlp_with_norm,
    "efficientformer_v2.ConvMlpWithNorm": _conv_mlp_with_mid,
    "efficientvim.FFN": _convs("fc1.conv", "fc1.norm", "fc1.act", "fc2.conv"),
    "efficientvit_msra.ConvMlp": _convs("pw1.conv", "pw1.bn", "act", "pw2.conv"),
    "fasternet.MLPBlock": Parts(up="mlp.0", act=("mlp.1", "mlp.2"), down="mlp.3", seat="mlp"),
    "fastvit.ConvMlp": Parts(
        up="fc1",
        act="act",
        dropout="drop",
        down="fc2",
        output_dropout="drop",
        seat="fc1",
        emptied=("act", "drop", "fc2"),
    ),
    "gemma4_vit.Gemma4GatedMlp": _gemma4_mlp,
    "iformer.FFN": _convs(
        "mixer.module.0.c", "mixer.module.0.bn", "mixer.module.1", "mixer.module.2.c"
    ),
    "inception_next.ConvMlp": _CONV_MLP,
    "levit.LevitMlp": _convs("ln1.linear", "ln1.bn", "act", "ln2.linear", dropout="drop"),
    "lowformer.LowFormerBlock": _residual_mlp("mlp.main"),
    # After the depthwise convolution.
    "pvt_v2.MlpWithDepthwiseConv": Parts(down="fc2", seat="fc2"),
    "rdnet.Block": _RDNET,
    "rdnet.BlockESE": _RDNET,
    "repvit.RepVitMlp": _convs("conv1.c", "conv1.bn", "act", "conv2.c"),
    "shvit.FFN": _convs("pw1.c", "pw1.bn", "act", "pw2.c"),
    "swiftformer.ConvEncoder": _POINTWISE_CONVS,
    "swiftformer.Mlp": Parts(
        up="fc1",
        act="act",
        dropout="drop",
        down="fc2",
        output_dropout="drop",
        seat="fc1",
        emptied=("act", "drop", "fc2"),
    ),
    "tiny_vit.NormMlp": Parts(
        input_norm="norm",
        up="fc1",
        act="act",
        dropout="drop1",
        down="fc2",
        output_dropout="drop2",
    ),
    "visformer.SpatialMlp": _spatial_mlp,
    "vision_transformer.ParallelScalingBlock": _FUSED,
    "vision_transformer.DiffParallelScalingBlock": _FUSED,
    "vitamin.GeGluMlp": Parts(
        input_norm="norm",
        gate="w0",
        up="w1",
        act="act",
        dropout="drop1",
        down="w2",
        output_dropout="drop2",
    ),
}


# Round trips. timm builds a model from the name of a registered function and its arguments, which
# it saves in config.json. A converted model is saved under the name of a function that builds the
# original model and puts the layers into it; without ecomoe timm does not know that name.


def token_embeddings(model: nn.Module) -> list[nn.Module]:
    """Return the embeddings that receive token ids: a model of timm has none."""
    return []


def remember(model: nn.Module, record: Mapping[str, Any]) -> None:
    """Enter a conversion in what timm saves of every model of its own that was touched.

    Args:
        model: The model that was converted, one of timm or one that holds some.
        record: The conversion; see `ecomoe.convert.rebuild`.
    """
    for name, part in model.named_modules():
        config = getattr(part, "pretrained_cfg", None)
        if not isinstance(config, dict) or "architecture" not in config:
            continue
        prefix = f"{name}." if name else ""
        blocks = [b.removeprefix(prefix) for b in record["blocks"] if b.startswith(prefix)]
        if blocks:
            _enter(part, config, {**record, "blocks": blocks})


def _enter(model: Any, config: Mapping[str, Any], record: Mapping[str, Any]) -> None:
    arguments = dict(getattr(model, "_model_args", {}))
    records = [*arguments.get("ecomoe_records", ()), record]
    base = arguments.get("ecomoe_base", config["architecture"])
    model._model_args = {**arguments, "ecomoe_base": base, "ecomoe_records": records}
    model.pretrained_cfg = model.default_cfg = {**config, "architecture": ecomoe_converted.__name__}


def ecomoe_converted(
    pretrained: bool = False,
    pretrained_cfg: Any = None,
    pretrained_cfg_overlay: Any = None,
    cache_dir: Any = None,
    ecomoe_base: str = "",
    ecomoe_records: Sequence[Mapping[str, Any]] = (),
    **kwargs: Any,
) -> nn.Module:
    """Build a timm model and put EcoMoE layers into it: an entry of timm's registry.

    Args:
        pretrained: Whether to load the weights that ``pretrained_cfg`` points to.
        pretrained_cfg: timm's description of the saved model.
        pretrained_cfg_overlay: As for `timm.create_model`.
        cache_dir: As for `timm.create_model`.
        ecomoe_base: Name of the model that was converted.
        ecomoe_records: How; see `ecomoe.convert.rebuild`.
        **kwargs: Arguments of that model.

    Raises:
        ValueError: It is called by hand.
    """
    import timm

    if not ecomoe_base:
        raise ValueError(
            "ecomoe_base='' must name the model that was converted; this entry only loads saved "
            "models: create the model by its own name and call ecomoe.convert"
        )
    kwargs.pop("pretrained_model_args", None)
    config = None if pretrained_cfg is None else dict(pretrained_cfg, architecture=ecomoe_base)
    model: Any = timm.create_model(
        ecomoe_base,
        pretrained_cfg=config,
        pretrained_cfg_overlay=pretrained_cfg_overlay,
        cache_dir=cache_dir,
        **kwargs,
    )
    rebuild(model, ecomoe_records)
    for record in ecomoe_records:
        remember(model, record)
    if pretrained:
        timm.models.load_pretrained(
            model,
            pretrained_cfg=model.pretrained_cfg,
            num_classes=model.num_classes,
            in_chans=kwargs.get("in_chans", 3),
        )
    result: nn.Module = model
    return result


def register(models: Any) -> None:
    """Let `timm.create_model` load converted models.

    Args:
        models: The module ``timm.models``.
    """
    models.register_model(ecomoe_converted)


def load(directory: Any) -> nn.Module:
    """Load a converted model that ``timm.models.save_for_hf`` wrote, in evaluation mode.

    Raises:
        ValueError: The directory holds no converted model, or no safetensors.
    """
    import timm

    path = Path(directory)
    name = json.loads((path / "config.json").read_text())["architecture"]
    if name != ecomoe_converted.__name__:
        raise ValueError(
            f"{directory} holds a {name} without EcoMoE layers; load it with timm and convert it"
        )
    if not (path / "model.safetensors").is_file():
        raise ValueError(
            f"{directory} holds no model.safetensors; save with safe_serialization=True"
        )
    model: nn.Module = timm.create_model(f"local-dir:{path}", pretrained=True)
    return model.eval()
