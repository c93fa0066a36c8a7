"""transformers: which modules are feed-forward blocks, how converted models are saved and loaded.

A converted model keeps its class. Its configuration gets two entries: ``ecomoe``, from which the
layers are built anew, and a name in ``fusion_config`` that transformers does not know. So loading
without ecomoe raises, where it would else end with dense blocks of random weights.

Importing this module does not import transformers.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from copy import deepcopy
from typing import Any

from torch import nn

from ecomoe.convert import rebuild
from ecomoe.integrations.huggingface_blocks import RULES, Sites
from ecomoe.moe import EcoMoE
from ecomoe.sites import class_rule

# Parts of mixtures of experts that are there already, which share their classes with dense blocks.
OTHER_PLACES = {"experts", "shared_expert", "shared_experts", "shared_mlp"}

# transformers says "Unknown fusion type: ..." and this.
SENTINEL = "ecomoe (this model was converted; import ecomoe, then load it with an Auto class)"


def recognise(name: str, module: nn.Module) -> Sites:
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


def token_embeddings(model: nn.Module) -> list[nn.Module]:
    """Return the embeddings that receive token ids, of every transformers model in ``model``."""
    from transformers import PreTrainedModel

    found: dict[int, nn.Module] = {}  # encoder and decoder may share one
    for part in model.modules():
        if isinstance(part, PreTrainedModel):
            try:
                embedding = part.get_input_embeddings()
            except NotImplementedError:
                continue
            # Of images and sound it is a convolution.
            if isinstance(embedding, nn.Embedding):
                found[id(embedding)] = embedding
    return list(found.values())


def remember(model: nn.Module, record: Mapping[str, Any]) -> None:
    """Enter a conversion in the configuration of every transformers model it touched.

    Args:
        model: The model that was converted, one of transformers or one that holds some.
        record: The conversion; see `ecomoe.convert.rebuild`.
    """
    from transformers import PreTrainedModel

    _own_configurations(model)
    seen = set()  # a model with a head shares its configuration with its base
    for name, part in model.named_modules():
        if not isinstance(part, PreTrainedModel) or id(part.config) in seen:
            continue
        prefix = f"{name}." if name else ""
        base = _base_prefix(part)
        blocks = [
            block.removeprefix(prefix).removeprefix(base)
            for block in record["blocks"]
            if block.startswith(prefix)
        ]
        if blocks:
            seen.add(id(part.config))
            records = [*(getattr(part.config, "ecomoe", None) or []), {**record, "blocks": blocks}]
            part.config.ecomoe = records
            _mark(part.config)


def _own_configurations(model: nn.Module) -> None:
    """Give a model copies of its configurations: a dense twin may have been built from the same."""
    from transformers import PreTrainedConfig

    copies: dict[int, Any] = {}  # one copy of each, also where one configuration holds another
    for module in model.modules():
        config = vars(module).get("config")
        if isinstance(config, PreTrainedConfig):
            module.config = deepcopy(config, copies)  # type: ignore[assignment]


def _base_prefix(model: Any) -> str:
    """Return the prefix of names in the base model, as transformers strips or adds it."""
    prefix = model.base_model_prefix
    return f"{prefix}." if prefix and hasattr(model, prefix) else ""


def _mark(config: Any) -> None:
    config.fusion_config = {**(getattr(config, "fusion_config", None) or {}), SENTINEL: True}


def loads_layers(config: Any) -> bool:
    """Whether a configuration is that of a converted model."""
    return bool(getattr(config, "ecomoe", None))


class _BuildsLayers:
    """Makes a model class build EcoMoE layers where its configuration says so."""

    config: Any

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        rebuild(self, config.ecomoe, prefix=_base_prefix(self))  # type: ignore[arg-type]
        wide = {
            f"{name}.{part}"
            for name, module in self.named_modules()  # type: ignore[attr-defined]
            if isinstance(module, EcoMoE)
            for part in ("router", "temperature", "prototypes")
        }
        strict = getattr(self, "_keep_in_fp32_modules_strict", None) or ()
        self._keep_in_fp32_modules_strict = {*strict, *wide}
        # From here on it is what it was when it was saved.
        self.__class__ = type(self).__mro__[2]

    @classmethod
    def from_pretrained(
        cls, directory: Any, *args: Any, output_loading_info: bool = False, **kwargs: Any
    ) -> Any:
        """Load as transformers does, and raise where a layer's weight is missing."""
        config = kwargs["config"]
        kwargs["fusion_config"] = {
            name: value for name, value in config.fusion_config.items() if name != SENTINEL
        }
        kwargs.setdefault("use_safetensors", True)
        model, info = super().from_pretrained(  # type: ignore[misc]
            directory, *args, output_loading_info=True, **kwargs
        )
        _mark(model.config)
        layers = tuple(f"{n}." for n, m in model.named_modules() if isinstance(m, EcoMoE))
        missing = [key for key in info["missing_keys"] if key.startswith(layers)]
        if missing:
            raise ValueError(
                f"{directory} lacks {len(missing)} weights of EcoMoE layers, among them "
                f"{missing[0]!r}; load the directory that the converted model was saved in"
            )
        return (model, info) if output_loading_info else model


@functools.cache
def loader_of(base: type[Any]) -> type[Any]:
    """Return a subclass of a model class that loads converted models; instances are of ``base``."""
    names = {"__module__": base.__module__, "__qualname__": base.__qualname__}
    return type(base.__name__, (_BuildsLayers, base), names)


def register(auto_factory: Any) -> None:
    """Let transformers' Auto classes load converted models.

    Wraps the one function by which they choose a class. It is private: a test holds that it is
    there and does this.

    Args:
        auto_factory: The module ``transformers.models.auto.auto_factory``.
    """
    choose = auto_factory._get_model_class

    @functools.wraps(choose)
    def choose_loader(config: Any, mapping: Any) -> Any:
        model_class = choose(config, mapping)
        return loader_of(model_class) if loads_layers(config) else model_class

    auto_factory._get_model_class = choose_loader


def load(directory: Any, *, dtype: Any, device_map: Any) -> nn.Module:
    """Load a converted model in the class it was saved from.

    Args:
        directory: Where ``save_pretrained`` wrote it.
        dtype: As for transformers' ``from_pretrained``.
        device_map: As for transformers' ``from_pretrained``.

    Raises:
        ValueError: The directory holds no converted model, or one of an unknown class.
    """
    import transformers

    config = transformers.AutoConfig.from_pretrained(directory, trust_remote_code=False)
    if not loads_layers(config):
        raise ValueError(
            f"{directory} holds a {config.model_type} model without EcoMoE layers; load it with "
            "transformers and convert it"
        )
    name = (config.architectures or ["none"])[0]
    base = getattr(transformers, name, None)
    if base is None:
        raise ValueError(
            f"{directory} was saved from class {name!r}, which transformers does not export; load "
            "it with one of transformers' Auto classes"
        )
    model: nn.Module = loader_of(base).from_pretrained(
        directory, config=config, dtype=dtype, device_map=device_map
    )
    return model
