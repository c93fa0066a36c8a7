"""A mixture-of-experts layer whose expert ecology is set by one number and watched as it trains."""

from typing import TYPE_CHECKING, Any

from ecomoe.auxiliary import aux_loss
from ecomoe.control import Control, control_parameter
from ecomoe.convert import convert
from ecomoe.experts_implementation import set_experts_implementation
from ecomoe.loading import extend_registries, from_pretrained
from ecomoe.moe import EcoMoE
from ecomoe.rescue import rescue

if TYPE_CHECKING:
    from ecomoe.ecology.monitor import Monitor
    from ecomoe.ecology.report import Report
    from ecomoe.ecology.taxonomy import Thresholds

    __version__: str

__all__ = [
    "Control",
    "EcoMoE",
    "Monitor",
    "Report",
    "Thresholds",
    "aux_loss",
    "control_parameter",
    "convert",
    "from_pretrained",
    "rescue",
    "set_experts_implementation",
]

extend_registries()

# What needs more than torch loads at first use.
_LAZY = {
    "Monitor": "ecomoe.ecology.monitor",
    "Report": "ecomoe.ecology.report",
    "Thresholds": "ecomoe.ecology.taxonomy",
}

if not TYPE_CHECKING:  # a type checker would take __getattr__ for leave to use any name

    def __getattr__(name: str) -> Any:
        from importlib import import_module, metadata

        if name == "__version__":
            return metadata.version("ecomoe")
        if name in _LAZY:
            return getattr(import_module(_LAZY[name]), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
