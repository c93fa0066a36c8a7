"""The 25 conformance checks, the models they run on, and why one is left out.

Each test names its checks by `covers`. From that `page.py` writes ``docs/conformance.md``, and
`test_matrix.py` holds that no cell is empty.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import timm
import torch
from torch import nn

import ecomoe
from ecomoe.integrations.tiny import inputs_for, tiny_model

FAMILIES = ("gpt2", "llama", "bert", "t5", "opt", "albert", "whisper", "vit", "convnext")
IMAGES = {"img_size": 32, "num_classes": 5}
SIZES = {**IMAGES, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
CONVNEXT = {"num_classes": 5, "depths": (1, 1, 0, 0), "dims": (16, 32, 32, 32)}
SWIN = {**IMAGES, "patch_size": 4, "embed_dim": 16, "depths": (1, 1), "num_heads": (2, 2)}
TIMM: dict[str, tuple[str, dict[str, Any]]] = {
    "timm ViT": ("vit_tiny_patch16_224", SIZES),
    "timm Swin": (
        "swin_tiny_patch4_window7_224",
        {**SWIN, "window_size": 4, "drop_path_rate": 0.0},
    ),
    "timm ConvNeXt": ("convnext_tiny", CONVNEXT),
    "timm ConvNeXt of convolutions": ("convnext_tiny", {**CONVNEXT, "conv_mlp": True}),
    "timm EVA": ("eva02_tiny_patch14_224", {**SIZES, "scale_mlp": True}),
    "timm Mixer": ("tiny_mixer", IMAGES),
}
MODELS = (*FAMILIES, *TIMM)


@timm.models.register_model
def tiny_mixer(pretrained: bool = False, pretrained_cfg: Any = None, **arguments: Any) -> Any:
    """An entry of timm's, since those of its mixers fix their sizes."""
    sizes = {"patch_size": 8, "num_blocks": 2, "embed_dim": 32}
    return timm.models.build_model_with_cfg(
        timm.models.MlpMixer,
        "tiny_mixer",
        pretrained,
        pretrained_cfg=pretrained_cfg or {"architecture": "tiny_mixer"},
        **sizes,
        **arguments,
    )


# Those that write, with the class that does.
WRITERS = {
    "gpt2": "AutoModelForCausalLM",
    "llama": "AutoModelForCausalLM",
    "opt": "AutoModelForCausalLM",
    "t5": "AutoModelForSeq2SeqLM",
    "whisper": "AutoModelForSpeechSeq2Seq",
}

CHECKS = {
    "1": "exact copies compute what the dense model does",
    "2": "state dict: strict round trip, no statistics in it",
    "3": "deepcopy after a training step",
    "4": "pickle and torch.save after a training step",
    "5": "saved and loaded bit-equal, buffers finite",
    "6": "loading without ecomoe fails loudly",
    "7": "conversion on the meta device",
    "8": "bf16, fp16, fp64: the output's dtype kept, routers in fp32 or wider",
    "9": "CPU autocast",
    "10": "no tokens",
    "11": "one token, fewer tokens than experts, E=1, k=E, widths off 16 bytes",
    "12": "a NaN token stays in its row, expert ids in range",
    "13": "an expert without tokens has zeros for a gradient",
    "14": "permuting and chunking tokens changes nothing",
    "15": "checkpointing changes no gradient; statistics counted once",
    "15 reentrant": "the same with reentrant checkpointing",
    "16": "accumulation equals one batch, partial windows too",
    "17": "a loss scaled by 1024",
    "18": "DDP: plain, looking for unused parameters, with a static graph",
    "19": "FSDP2",
    "20": "expert parallelism",
    "21": "one graph under torch.compile, equal to eager, at most 3 graphs",
    "22": "no operation depends on data",
    "23": "same seed, same bits; evaluation draws nothing",
    "24 export": "torch.export with a dynamic batch",
    "24 func.grad": "torch.func.grad",
    "24 vmap": "vmap(grad) over samples",
    "24 gradcheck": "gradcheck in fp64",
    "24 script": "torch.jit.script: a clear error",
    "25 LoRA": "LoRA on experts",
    "25 quantisation": "dynamic quantisation leaves routers alone",
    "25 average": "an exponential moving average copies and follows the model",
    "25 decay": "experts' biases are spared weight decay",
    "25 calls": "a layer called several times counts once",
    "25 generate": "generate() equals the dense model's, with and without cache",
    "25 evaluation": "evaluation emits no auxiliary loss",
    "25 task loss": "the task loss stays as it is",
}

_ALL_BUT_ALBERT = {
    name: "calls each layer once in a forward pass" for name in MODELS if name != "albert"
}
_NO_WRITERS = {name: "does not generate" for name in MODELS if name not in WRITERS}
_NO_CHECKPOINTING = dict.fromkeys(
    ("albert", "convnext"), "transformers has no checkpointing for it"
)
# Check: model: why it does not apply.
LEFT_OUT: dict[str, dict[str, str]] = {
    "15": _NO_CHECKPOINTING,
    "15 reentrant": {
        **_NO_CHECKPOINTING,
        **dict.fromkeys(TIMM, "timm checkpoints without reentrance only"),
    },
    "25 quantisation": {"timm EVA": "timm's attention reads weights that quantisation hides"},
    "25 calls": _ALL_BUT_ALBERT,
    "25 generate": _NO_WRITERS,
}

SETTINGS: dict[str, Any] = {"tiers": (2, 1, 1), "verbose": False}

# Matrices in another grouping round differently: relative to the greatest output.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


class Cover(NamedTuple):
    """A test that does a check, and on which models."""

    test: str
    models: tuple[str, ...]
    slow: frozenset[str]


COVERS: dict[str, list[Cover]] = {check: [] for check in CHECKS}


def covers(*checks: str, slow: bool | tuple[str, ...] = False) -> Callable[[Any], Any]:
    """Run a test on all models that its checks apply to: ``name``, or the fixture `dense`.

    ``slow`` marks it, on all models or on those named.
    """
    models = [m for m in MODELS if not all(m in LEFT_OUT.get(check, {}) for check in checks)]
    slow_models = frozenset(models if slow is True else slow or ())

    def mark(test: Any) -> Any:
        for check in checks:
            applies = tuple(m for m in models if m not in LEFT_OUT.get(check, {}))
            COVERS[check].append(
                Cover(f"{test.__module__}.py::{test.__name__}", applies, slow_models)
            )
        cases = [
            pytest.param(m, marks=[pytest.mark.slow] if m in slow_models else []) for m in models
        ]
        return pytest.mark.parametrize("name", cases)(test)

    return mark


def skip_left_out(check: str, name: str) -> None:
    """Skip a case of a test that does several checks, where this one does not apply."""
    reason = LEFT_OUT.get(check, {}).get(name)
    if reason is not None:
        pytest.skip(reason)


def build(name: str, *, auto: str = "AutoModel", **overrides: Any) -> Any:
    """Return a dense model, its parameters off 0 and off LayerScale's 1e-6, in evaluation mode."""
    torch.manual_seed(0)
    if name in TIMM:
        entry, arguments = TIMM[name]
        model: Any = timm.create_model(entry, **{**arguments, **overrides})
    else:
        model = tiny_model(name, auto=auto, **overrides)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def inputs_of(model: Any, *, batch: int = 2) -> dict[str, torch.Tensor]:
    """Return inputs for a model."""
    torch.manual_seed(1)
    if hasattr(model, "config"):
        return inputs_for(model, batch=batch)
    return {"x": torch.randn(batch, 3, 32, 32)}


def call(model: Any, inputs: dict[str, torch.Tensor]) -> Any:
    """Run a model on inputs in its dtype."""
    dtype = next(model.parameters()).dtype
    return model(**{k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()})


def run(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return a model's first output."""
    output = call(model, inputs)
    return output if isinstance(output, torch.Tensor) else output[0]


def task_loss(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return a loss that is a mean over samples and needs every parameter."""
    output = call(model, inputs)
    if isinstance(output, torch.Tensor):
        return output.float().square().mean()
    parts = [output[0], getattr(output, "pooler_output", None)]
    return torch.stack([y.float().square().mean() for y in parts if y is not None]).sum()


def layers_of(model: nn.Module) -> list[ecomoe.EcoMoE]:
    """Return a model's layers."""
    return [m for m in model.modules() if isinstance(m, ecomoe.EcoMoE)]


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Return the greatest difference over the greatest value."""
    return ((got - want).abs().max() / want.abs().max()).item()


def without_dropout(model: nn.Module) -> None:
    """Switch off what is random in training."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("dropout", "activation_dropout", "output_dropout", "layerdrop"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def step(model: nn.Module, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return one training step's gradients, by name."""
    model.zero_grad()
    (task_loss(model, inputs) + ecomoe.aux_loss(model)).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def probe(
    model: nn.Module, inputs: dict[str, torch.Tensor]
) -> list[tuple[ecomoe.EcoMoE, torch.Tensor]]:
    """Return each layer with the tokens that reach it, as rows (N, D)."""
    seen: list[tuple[Any, torch.Tensor]] = []

    def keep(layer: Any, arguments: Any) -> None:
        x = arguments[0].detach()
        if isinstance(layer, ecomoe.sites.ChannelsFirst):
            x = x.movedim(1, -1)
        seen.append((layer, x.reshape(-1, layer.d_model).clone()))

    handles = [layer.register_forward_pre_hook(keep) for layer in layers_of(model)]
    with torch.no_grad():
        run(model, inputs)
    for handle in handles:
        handle.remove()
    return seen
