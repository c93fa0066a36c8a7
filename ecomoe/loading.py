"""Load converted models, by `from_pretrained` or by the library's own functions.

transformers and timm build a model from a configuration; theirs must learn that some models have
EcoMoE layers. They are told once their registry has been imported, whether that was before or after
ecomoe: importing ecomoe imports neither.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from os import PathLike
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

# What is fetched of a repository on the hub: no pickle, no code.
_FETCHED = ("config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json")

# Modules that hold a registry, and the adapter whose ``register(module)`` extends it.
_REGISTRIES = {
    "transformers.models.auto.auto_factory": "ecomoe.integrations.huggingface",
    "timm.models": "ecomoe.integrations.timm",
}


def from_pretrained(
    source: str | PathLike[str],
    *,
    revision: str | None = None,
    dtype: torch.dtype | str | None = None,
    device_map: Any = None,
) -> nn.Module:
    """Load a converted model in the class it was saved from, bit for bit.

    Reads safetensors alone: nothing is unpickled and no code of the checkpoint is run.

    Args:
        source: The directory where ``model.save_pretrained`` (transformers) or
            ``timm.models.save_for_hf`` wrote it, or the name of a repository on the Hugging Face
            hub that holds such a directory.
        revision: Branch, tag or commit on the hub.
        dtype: Dtype of the weights other than routers; by default as saved. transformers only.
        device_map: As for transformers' ``from_pretrained``. transformers only.

    Returns:
        The model, in evaluation mode.

    Raises:
        ValueError: The directory holds no converted model, there is neither such a directory nor
            such a repository, or an argument has no effect.
    """
    if not isinstance(source, (str, PathLike)):
        raise ValueError(
            f"source={source!r} must be a path or a name on the hub; pass the directory that the "
            "model was saved in"
        )
    if isinstance(source, str) and not Path(source).exists():
        directory = _fetch(source, revision)
    elif revision is None:
        directory = Path(source)
    else:
        raise ValueError(
            f"revision={revision!r} has no effect on the directory {source}; leave it out"
        )
    path = directory / "config.json"
    if not path.is_file():
        raise ValueError(f"{path} must be a file; pass the directory that the model was saved in")
    config = json.loads(path.read_text())
    if "model_type" in config:
        adapter = import_module("ecomoe.integrations.huggingface")
        dtype = "auto" if dtype is None else dtype
        model: nn.Module = adapter.load(directory, dtype=dtype, device_map=device_map)
        return model
    if "architecture" in config:
        if dtype is not None or device_map is not None:
            raise ValueError(
                f"dtype={dtype} and device_map={device_map!r} have no effect on timm models; leave "
                "them out and use model.to(...)"
            )
        model = import_module("ecomoe.integrations.timm").load(directory)
        return model
    raise ValueError(f"{path} must be that of a transformers or timm model; it names neither")


def _fetch(name: str, revision: str | None) -> Path:
    """Bring a repository's configuration and weights here and return their directory."""
    snapshot_download = import_module("huggingface_hub").snapshot_download
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(_FETCHED)))
    except (OSError, ValueError) as problem:
        raise ValueError(
            f"source={name!r} must be a directory, or a repository on the hub that can be reached; "
            f"pass the directory that the model was saved in ({problem})"
        ) from problem


class _Watch(MetaPathFinder):
    """Calls ``register`` of an adapter as soon as its library's registry has been imported."""

    def __init__(self, waiting: set[str]) -> None:
        self.waiting = waiting

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in self.waiting:
            return None
        self.waiting.discard(fullname)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                _register(fullname)

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def _register(name: str) -> None:
    import_module(_REGISTRIES[name]).register(sys.modules[name])


def extend_registries() -> None:
    """Extend the registries that are imported already, and the others once they are."""
    waiting = set()
    for name in _REGISTRIES:
        if name in sys.modules:
            _register(name)
        else:
            waiting.add(name)
    sys.meta_path.insert(0, _Watch(waiting))
