"""The taps of layers that can be read: `EcoMoE`, routers of transformers, others on request.

Axes: N tokens, E experts, K experts chosen for a token, S = N * K slots sorted by expert, F output
features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ecomoe.dispatch import Plan
from ecomoe.ecology.decode import decode
from ecomoe.ecology.taps import Decision, LayerTap
from ecomoe.ecology.traffic import Traffic
from ecomoe.moe import EcoMoE
from ecomoe.routers import Part
from ecomoe.routing import Routing

Reader = Callable[[nn.Module, tuple[Any, ...], Any], Decision]

ROUTER_NAMES = ("router", "gate")


class EcoTap(LayerTap):
    """Reads an `EcoMoE` layer."""

    def __init__(self, name: str, layer: EcoMoE, *, traffic: Traffic) -> None:
        super().__init__(name, traffic=traffic, tiers=layer.tiers, device=layer.temperature.device)
        self.layer = layer
        self.top_k = layer.top_k
        self.control = layer.control

    def hooks(self) -> Iterator[tuple[nn.Module, str, Callable[..., None]]]:
        """Yield the modules to hook, ``"before"`` or ``"after"``, and the calls that read them."""
        yield self.layer.router, "after", self._read_router
        if self.layer.num_classes is not None:
            yield self.layer.experts, "after", self._read_experts

    def extras(self) -> dict[str, Tensor]:
        """Return the current temperature and the last call's auxiliary losses."""
        terms = self.layer.auxiliary.terms
        return {"temperature": self.layer.temperature} | {f"aux.{n}": t for n, t in terms.items()}

    def part(self) -> Part | None:
        """Return which of the model's tokens the call has, if not all."""
        return self.layer.router.part

    def _read_router(self, module: nn.Module, args: tuple[Any, ...], routing: Routing) -> None:
        decision = Decision(
            routing.expert_ids_NK,
            routing.weights_NK.detach(),
            routing.logits_NE.detach(),
            routing.probs_NE.detach(),
            args[1],
        )
        self.observe(decision, module=module)
        self.compare(args[0], self._all_outputs, experts=self.layer.experts, module=module)

    def _all_outputs(self, x_MD: Tensor, rows_M: Tensor) -> tuple[Tensor, Tensor]:
        outputs_MEF = self.layer.experts.all_outputs(x_MD)
        return outputs_MEF, torch.ones((), dtype=torch.bool, device=x_MD.device)

    def _read_experts(
        self, module: nn.Module, args: tuple[Tensor, Plan], outputs_SF: Tensor
    ) -> None:
        if self.traffic.phase_of(module) == "eval":
            first_N = args[1].inverse_S[:: self.top_k]
            highest_N, predicted_N = outputs_SF.detach()[first_N].max(-1)
            self.observe_predictions(torch.where(highest_N.isnan(), -1, predicted_N))


class RouterTap(LayerTap):
    """Reads a router of transformers, and checks it by what the experts receive.

    Args:
        name: The layer's name.
        router: The module whose output holds the decision.
        logits_index: Position of the logits in its output.
        parent: The module that holds router and experts.
        traffic: Shared by all taps of a model.
        side: As for `LayerTap`.
    """

    def __init__(
        self,
        name: str,
        router: nn.Module,
        *,
        logits_index: int,
        parent: nn.Module,
        traffic: Traffic,
        side: str = "",
    ) -> None:
        super().__init__(name, traffic=traffic, side=side)
        self.router = router
        self.logits_index = logits_index
        self.parent = parent
        experts = getattr(parent, "experts", None)
        self.experts = experts if isinstance(experts, nn.Module) else None
        num_keys = getattr(router, "num_keys", None)
        self.num_keys = num_keys if isinstance(num_keys, int) else None
        self.given_top_k = _top_k_of(router, parent)
        if self.num_keys is not None:
            # Its experts are looked up before the router's output is seen.
            self.tiers = (int(router.num_experts),)  # type: ignore[arg-type]
            self.allocate(next(router.parameters()).device)

    def hooks(self) -> Iterator[tuple[nn.Module, str, Callable[..., None]]]:
        """Yield the modules to hook, ``"before"`` or ``"after"``, and the calls that read them."""
        yield self.router, "after", self._read_router
        # A product-key router looks its experts up in embeddings.
        receiver = self.experts or getattr(self.router, "down_embed", None)
        if isinstance(receiver, nn.Module):
            yield receiver, "before", self._read_executed

    def _has_skip_column(self, num_columns: int) -> bool:
        # The last column stands for "no expert": such a choice is passed on as expert 0, gate 0.
        num_experts = getattr(self.experts, "num_experts", None)
        return isinstance(num_experts, int) and num_experts == num_columns - 1

    def _read_router(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        try:
            decision = decode(
                output,
                logits_index=self.logits_index,
                top_k=self.given_top_k,
                num_keys=self.num_keys,
            )
        except ValueError as error:
            self.refused = str(error)
            return
        assert decision.logits_NE is not None
        num_columns = decision.logits_NE.shape[-1]
        if self._has_skip_column(num_columns) and decision.weights_NK is not None:
            ids_NK = torch.where(decision.weights_NK == 0, num_columns - 1, decision.expert_ids_NK)
            decision = decision._replace(expert_ids_NK=ids_NK)
        self.observe(decision, module=module)

    def _read_executed(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        if not self.sums:
            return
        given = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        integers = [value for value in given if not value.is_floating_point() and value.dim() >= 2]
        if not integers:
            return
        ids_NK = integers[0].detach()
        num_columns = self.num_experts
        if ids_NK.dim() == 3:  # a one-hot mask (N, K, E); a dropped slot has no one
            ids_NK = torch.where(ids_NK.sum(-1) > 0, ids_NK.argmax(-1), -1)
        elif self._has_skip_column(num_columns):
            gates = [v for v in given if v.is_floating_point() and v.shape == ids_NK.shape]
            if gates:
                ids_NK = torch.where(gates[0].detach() == 0, num_columns - 1, ids_NK)
        self.observe_executed(ids_NK.long(), module=module)
        if len(given) == len(args) + len(kwargs) == 3 and self._is_stacked(module):
            self._compare_stacked(module, given, names=list(kwargs))

    def _is_stacked(self, module: nn.Module) -> bool:
        # The weights of all experts are one tensor a projection, as most families have them.
        num_experts = self.num_experts
        stacks = [p for p in module.parameters() if p.dim() == 3]
        known = getattr(module, "num_experts", None) == num_experts
        return known and bool(stacks) and all(p.shape[0] == num_experts for p in stacks)

    def _compare_stacked(self, module: nn.Module, given: list[Tensor], *, names: list[str]) -> None:
        x_ND, ids_NK, weights_NK = given
        if x_ND.dim() != 2 or ids_NK.dim() != 2 or ids_NK.shape != weights_NK.shape:
            return
        num_experts = self.num_experts

        def run(*values: Tensor) -> Tensor:
            positional = len(values) - len(names)
            by_name = dict(zip(names, values[positional:], strict=True))
            # Not the instance's forward, which others may have wrapped to count or to move things.
            outputs: Tensor = type(module).forward(module, *values[:positional], **by_name)
            return outputs

        def outputs_of(x_MD: Tensor, rows_M: Tensor) -> tuple[Tensor, Tensor]:
            num_probes = x_MD.shape[0]
            every_S = torch.arange(num_experts, device=ids_NK.device).repeat_interleave(num_probes)
            ids_S1 = every_S[:, None].to(ids_NK.dtype)
            outputs = run(x_MD.repeat(num_experts, 1), ids_S1, weights_NK.new_ones(ids_S1.shape))
            outputs_MEF = outputs.view(num_experts, num_probes, -1).transpose(0, 1)
            # Mixed by the gates they must give what the block gives, or they are something else.
            ids_MK, weights_MK = ids_NK[rows_M], weights_NK.detach()[rows_M]
            expected_MF = run(x_MD, ids_MK, weights_MK).float()
            places_MK1 = ids_MK.long().clamp(0, num_experts - 1)[:, :, None]
            chosen_MKF = outputs_MEF.float().gather(
                1, places_MK1.expand(-1, -1, outputs_MEF.shape[-1])
            )
            mixed_MF = (chosen_MKF * weights_MK[:, :, None]).sum(1)
            tolerance = 0.05 * expected_MF.abs().max()
            return outputs_MEF, ((mixed_MF - expected_MF).abs() <= tolerance).all()

        try:
            self.compare(x_ND, outputs_of, experts=module, module=module)
        except (RuntimeError, TypeError, ValueError, AttributeError, LookupError):
            self.compared = True  # experts that cannot be asked like this are not compared


class CustomTap(LayerTap):
    """Reads a module by a function that its user gives.

    Args:
        name: The module's name.
        module: The module whose forward makes the decision known.
        read: From the module, its arguments and its output to the `Decision`; with ``logits_NE``.
        traffic: Shared by all taps of a model.
    """

    def __init__(self, name: str, module: nn.Module, *, read: Reader, traffic: Traffic) -> None:
        super().__init__(name, traffic=traffic)
        self.module = module
        self.read = read

    def hooks(self) -> Iterator[tuple[nn.Module, str, Callable[..., None]]]:
        """Yield the module to hook, ``"after"``, and the call that reads it."""
        yield self.module, "after", self._read

    def _read(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.observe(self.read(module, args, output), module=module)


def find_taps(
    model: nn.Module, *, traffic: Traffic, readers: Mapping[type[nn.Module], Reader]
) -> list[LayerTap]:
    """Return a tap for each layer of the model that can be read, in the model's order.

    Args:
        model: The whole model.
        traffic: Shared by all taps.
        readers: By class of module, how to read it; they come before what is known already.
    """
    modules = dict(model.named_modules())
    found: dict[str, LayerTap] = {}
    for name, module in modules.items():
        read = next((read for cls, read in readers.items() if isinstance(module, cls)), None)
        if read is not None:
            found[name] = CustomTap(name, module, read=read, traffic=traffic)
        elif isinstance(module, EcoMoE):
            found[name] = EcoTap(name, module, traffic=traffic)
    taken = tuple(found)
    for name, index in _routers(modules).items():
        if any(name == other or _holds(other, name) for other in taken):
            continue
        parent_name = _parent_with_experts(name, modules)
        side = "decoder_" if "decoder" in name.split(".") else ""
        # A layer may hold two routers: then each goes by its own name.
        layer_name = name if parent_name in found else parent_name
        found[layer_name] = RouterTap(
            layer_name,
            modules[name],
            logits_index=index,
            parent=modules[parent_name],
            traffic=traffic,
            side=side,
        )
    order = {name: position for position, name in enumerate(modules)}
    return sorted(found.values(), key=lambda tap: order[tap.name])


def _routers(modules: Mapping[str, nn.Module]) -> dict[str, int]:
    """Return the routers' names, with the position of the logits in what they return."""
    targets: list[tuple[type[nn.Module], int]] = []
    for module in modules.values():
        recorders = getattr(type(module), "_can_record_outputs", None) or {}
        declared = recorders.get("router_logits", []) if isinstance(recorders, Mapping) else []
        for recorder in declared if isinstance(declared, list) else [declared]:
            target = getattr(recorder, "target_class", recorder)
            if isinstance(target, type):
                targets.append((target, getattr(recorder, "index", 0)))
    found: dict[str, int] = {}
    for name, module in modules.items():
        index = next((index for target, index in targets if isinstance(module, target)), None)
        if index is not None:
            found[name] = index
        elif isinstance(getattr(module, "experts", None), nn.Module):
            # No recorder names it, but it stands where a router stands.
            for child_name in ROUTER_NAMES:
                if isinstance(getattr(module, child_name, None), nn.Module):
                    found.setdefault(f"{name}.{child_name}".lstrip("."), 0)
    # What holds another router only passes its logits on.
    return {
        name: index
        for name, index in found.items()
        if name in modules and not any(_holds(name, other) for other in found)
    }


def _holds(outer: str, inner: str) -> bool:
    return inner.startswith(f"{outer}." if outer else "") and inner != outer


def _parent_with_experts(name: str, modules: Mapping[str, nn.Module]) -> str:
    """Return the nearest holder of a router that has experts; adapters may stand between."""
    parts = name.split(".")
    for depth in range(len(parts) - 1, max(-1, len(parts) - 4), -1):
        candidate = ".".join(parts[:depth])
        if isinstance(getattr(modules[candidate], "experts", None), nn.Module):
            return candidate
    return ".".join(parts[:-1]) if not hasattr(modules[name], "num_keys") else name


def _top_k_of(*modules: nn.Module) -> int | None:
    for module in modules:
        for holder in (module, getattr(module, "config", None)):
            for name in ("top_k", "num_experts_per_tok", "moe_top_k"):
                value = getattr(holder, name, None)
                if type(value) is int:
                    return value
    return None
