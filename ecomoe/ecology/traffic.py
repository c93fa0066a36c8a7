"""What is known of the model's forward passes: their kind, their padding, their data.

Axes: N tokens, P places of a tensor that are looked at.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from ecomoe.ecology.statistics import wide_dtype
from ecomoe.routers import Part

Phase: TypeAlias = Literal["train", "eval", "generate"]
PHASES: tuple[Phase, Phase, Phase] = ("train", "eval", "generate")
NUM_PLACES = 4096
GOLDEN = 0.6180339887498949


class Traffic:
    """What is known of the forward pass in progress, told by hooks on the whole model.

    Args:
        token_buckets: Groups to sort the ids of tokens into; with 0 they are not looked at.
        coactivation: ``"eval"``, or ``"always"``: in which traffic to count pairs of experts.

    Attributes:
        inside: Whether a forward pass of the whole model is in progress.
        phase: Its kind of traffic.
        evaluated: Whether evaluation passes were seen; the monitor resets it.
        data: Fingerprint of the first of them, or ``None``; the monitor resets it.
        outputs_shape: Of what the last evaluation pass gave, where that was a tensor or has logits.
        constants: What layers of one size have in common, by size and device.
    """

    def __init__(self, *, token_buckets: int = 0, coactivation: str = "eval") -> None:
        self.token_buckets = token_buckets
        self.coactivation = coactivation
        self.constants: dict[tuple[tuple[int, ...], torch.device], tuple[Tensor, Tensor]] = {}
        self.inside = False
        self.phase: Phase = "train"
        self.evaluated = False
        self.data: Tensor | None = None
        self.outputs_shape: torch.Size | None = None
        self.masks: dict[str, Tensor] = {}
        self.buckets: dict[str, Tensor] = {}

    def begin(self, training: bool, inputs: dict[str, Any]) -> None:
        """Note the phase and the padding of a pass."""
        self.inside = True
        # generate() says whether to use a cache, or for which positions it wants logits.
        signs = ("past_key_values", "use_cache", "logits_to_keep")
        generating = any(inputs.get(sign) is not None for sign in signs)
        # In the middle of training, rollouts come from a model whose mode is still that.
        generating = generating and not (training and torch.is_grad_enabled())
        self.phase = "generate" if generating else "train" if training else "eval"
        self.masks = {}
        for side in ("", "decoder_"):
            mask = inputs.get(f"{side}attention_mask")
            if isinstance(mask, Tensor) and mask.dim() == 2:
                ids = inputs.get(f"{side}input_ids")
                if isinstance(ids, Tensor) and ids.dim() == 2:
                    mask = mask[:, -ids.shape[1] :]  # with a cache, only the last tokens come in
                self.masks[side] = mask.reshape(-1) != 0
        if self.phase == "eval" and self.data is None:
            self.data = fingerprint(inputs)
        self.buckets = {}
        if self.phase == "eval" and self.token_buckets:
            for side, name in (("", "input_ids"), ("decoder_", "decoder_input_ids")):
                # A model of one's own may call them otherwise: they come first then.
                ids = inputs.get(name, None if side else next(iter(inputs.values()), None))
                if isinstance(ids, Tensor) and ids.dim() == 2 and ids.dtype == torch.int64:
                    self.buckets[side] = hashed(ids.reshape(-1), num_buckets=self.token_buckets)

    def end(self) -> None:
        """Forget the pass."""
        self.inside = False
        self.masks = {}
        self.buckets = {}

    def may_predict(self, num_predictions: int, *, num_classes: int) -> bool:
        """Whether so many predictions may be all that follow from the last evaluation pass.

        There is one a sample, one for each of several places in it, or, where classes are not the
        last axis, as many as there are outputs for all classes. If nothing is known, any may.
        """
        shape = self.outputs_shape
        if shape is None or len(shape) < 2:
            return True
        leading = [math.prod(shape[:axes]) for axes in range(1, len(shape))]
        return num_predictions in (*leading, math.prod(shape) / num_classes)

    def phase_of(self, module: nn.Module) -> Phase:
        """Return in which traffic a module runs; outside a pass its own mode tells."""
        if self.inside:
            return self.phase
        return "train" if module.training else "eval"


def known_of(
    by_side: dict[str, Tensor],
    num_tokens: int,
    *,
    device: torch.device,
    side: str = "",
    part: Part | None = None,
) -> Tensor | None:
    """Return what is known of each of a layer's tokens, ``(N,)``, or ``None`` if nothing is.

    Args:
        by_side: `Traffic.masks` or `Traffic.buckets`.
        num_tokens: N.
        device: Where the layer is.
        side: The layer's, which is asked first.
        part: Which tokens they are, where a layer is not given all of the model's.
    """
    if part is not None:
        all_N = known_of(by_side, part.num_tokens, device=device, side=side)
        return None if all_N is None else all_N[part.rows_M]
    for key in (side, *by_side):
        values_N = by_side.get(key)
        if values_N is not None and values_N.shape[0] == num_tokens:
            # A model may be spread over devices; what was brought to one is there for its layers.
            by_side[key] = values_N = values_N.to(device, non_blocking=True)
            return values_N
    return None


def hashed(ids: Tensor, *, num_buckets: int) -> Tensor:
    """Return the bucket of each id: neighbours in the vocabulary are spread (Knuth's hashing)."""
    return ((ids * 2654435761) % 2**32 * num_buckets) // 2**32


def fingerprint(inputs: Mapping[str, Any]) -> Tensor | None:
    """Return a number that tells a model's inputs from others, without waiting for the device.

    A sum of evenly spaced entries of all tensors, weighed by their place; the same inputs give the
    same number but for rounding. ``None`` where there are no tensors.
    """
    # Plain tensors alone: not every kind can be indexed.
    given = [v for v in inputs.values() if type(v) is Tensor and not v.is_complex()]
    total: Tensor | None = None
    for position, value in enumerate(given, start=1):
        if value.device != given[0].device or value.layout != torch.strided or not value.numel():
            continue
        wide = wide_dtype(value.device)
        places_P = torch.arange(NUM_PLACES, device=value.device)
        entries_P = value.detach().reshape(-1)[places_P * value.numel() // NUM_PLACES].to(wide)
        weights_P = (places_P + position).to(wide) * GOLDEN % 1
        part = (entries_P.nan_to_num() * weights_P).sum()
        total = part if total is None else total + part
    return total


class RootTap:
    """Reads the whole model's inputs and, in evaluation, its outputs and labels.

    Args:
        model: The whole model.
        traffic: Told of each pass.
        on_begin: Called at the start of each pass.
        on_outputs: Called at the end of an evaluation pass with the outputs and the inputs by name.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        traffic: Traffic,
        on_begin: Callable[[], None],
        on_outputs: Callable[[Any, dict[str, Any]], None],
    ) -> None:
        self.traffic = traffic
        self.on_begin = on_begin
        self.on_outputs = on_outputs
        while isinstance(
            inner := getattr(model, "_orig_mod", getattr(model, "module", None)), nn.Module
        ):
            model = inner  # a compiled or a distributed wrapper takes *args
        parameters = inspect.signature(model.forward).parameters.values()
        self.names = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]

    def _inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        return dict(zip(self.names, args, strict=False)) | kwargs

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook."""
        if not recomputing():
            self.traffic.begin(module.training, self._inputs(args, kwargs))
            self.on_begin()

    def after(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Any
    ) -> None:
        """Forward hook, called even where the forward raised."""
        if recomputing():
            return
        phase = self.traffic.phase
        self.traffic.end()
        if phase == "eval" and outputs is not None:
            logits = outputs.get("logits") if isinstance(outputs, Mapping) else outputs
            self.traffic.outputs_shape = logits.shape if isinstance(logits, Tensor) else None
            self.on_outputs(outputs, self._inputs(args, kwargs))


def recomputing() -> bool:
    """Whether a backward pass runs this forward again (gradient checkpointing)."""
    if torch.compiler.is_compiling():
        return False
    return bool(torch._C._current_graph_task_id() != -1)
