"""The control parameter E = T*H/(O+B), its phases, and the settings that give it.

The symbols are the paper's (Zhang 2026, arXiv:2605.06415): T the temperature of the routing
softmax, H the weight of the entropy loss, O of the oracle loss, B of the balance loss. All are
dimensionless. The phase that E implies is a prediction, not a measurement.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from numbers import Real
from typing import Literal, TypeAlias

from ecomoe.arguments import LARGEST

__all__ = ["Control", "Phase", "control_parameter", "phase_of"]

Phase: TypeAlias = Literal["healthy", "sub-health", "collapse"]

HEALTHY_E = 0.5
COLLAPSE_E = 0.2

# Share of uniform usage that a healthy E sustains: three times what the taxonomy calls DEAD among
# 16 experts, so that a batch's sampling noise does not take a living expert below that.
_FLOOR = 0.5

# The setting behind the paper's E = 0.545 (Table 4), through which `from_target` splits T*H.
_REFERENCE_TEMPERATURE = 3.0
_REFERENCE_PRODUCT = 0.3

_COMPLEXITIES: dict[str, Callable[[int], float]] = {"log": math.log, "sqrt": math.sqrt}


def control_parameter(
    *,
    temperature: float,
    entropy_weight: float,
    oracle_weight: float,
    balance_weight: float,
) -> float:
    """Return E = T*H/(O+B), the router's exploration budget (section 3.2, equation 2).

    E is infinite when nothing opposes exploration (O+B = 0).

    Raises:
        ValueError: A value is not a finite number, T is not positive, a weight is negative, or
            both T*H and O+B are zero, where E is undefined.

    Example:
        The two settings of Table 4:

        >>> common = dict(temperature=3.0, entropy_weight=0.10, oracle_weight=0.15)
        >>> round(control_parameter(**common, balance_weight=0.40), 3)
        0.545
        >>> round(control_parameter(**common, balance_weight=0.85), 3)
        0.3
    """
    _require_positive("temperature", temperature, "choose one, such as 3.0")
    _require_weight("entropy_weight", entropy_weight)
    _require_weight("oracle_weight", oracle_weight)
    _require_weight("balance_weight", balance_weight)
    exploration = temperature * entropy_weight
    opposition = oracle_weight + balance_weight
    if opposition > 0:
        return exploration / opposition
    if exploration > 0:
        return math.inf
    raise ValueError(
        f"{entropy_weight=}, {oracle_weight=} and {balance_weight=} must not all be zero, "
        "for E = T*H/(O+B) would be 0/0; raise at least one"
    )


def phase_of(e: float) -> Phase:
    """Return the phase that the paper predicts for an E (section 4.4).

    Healthy: no dead expert. Sub-health: experts die and can recover. Collapse: they die for good.
    The paper leaves E = 0.2 itself open; here it is sub-health.

    Raises:
        ValueError: `e` is NaN, negative or no number.

    Example:
        >>> [phase_of(e) for e in (0.545, 0.30, 0.14)]
        ['healthy', 'sub-health', 'collapse']
    """
    if not _is_number(e) or not e >= 0:
        raise ValueError(f"{e=} must be a number >= 0; work it out with control_parameter")
    if e >= HEALTHY_E:
        return "healthy"
    return "sub-health" if e >= COLLAPSE_E else "collapse"


@dataclass(frozen=True, kw_only=True)
class Control:
    """The four settings that make up E, and the schedule of the temperature.

    E is nominal: it is taken at the initial temperature, as in the paper. `e_at` follows it as
    the temperature anneals. Multiplying H, O and B by one factor leaves E as it is but not the
    training, so E alone does not say how strongly the router is steered.

    Without an oracle and a balance loss E is infinite and its phase "healthy". Distrust that
    corner: the paper's own ablation finds that without the balance loss dead experts stay dead
    (section 5, "Expert revival mechanism").

    Attributes:
        temperature: T at the start of training, > 0.
        entropy_weight: H >= 0.
        oracle_weight: O >= 0.
        balance_weight: B >= 0.
        final_temperature: Where annealing ends, > 0. A temperature already below it is kept.
        anneal_fraction: The share of training that annealing takes, in (0, 1]; the paper's is 30
            of 100 epochs (section 3.4).

    Raises:
        ValueError: A value breaks its rule above, or E is undefined (0/0).

    Example:
        >>> control = Control(
        ...     temperature=3.0, entropy_weight=0.10, oracle_weight=0.15, balance_weight=0.40
        ... )
        >>> round(control.e, 3), control.phase
        (0.545, 'healthy')
    """

    temperature: float
    entropy_weight: float
    oracle_weight: float
    balance_weight: float
    final_temperature: float = 0.3
    anneal_fraction: float = 0.3

    def __post_init__(self) -> None:
        control_parameter(
            temperature=self.temperature,
            entropy_weight=self.entropy_weight,
            oracle_weight=self.oracle_weight,
            balance_weight=self.balance_weight,
        )
        _require_positive(
            "final_temperature",
            self.final_temperature,
            "set it equal to temperature to switch annealing off",
        )
        if not _is_number(self.anneal_fraction) or not 0 < self.anneal_fraction <= 1:
            raise ValueError(
                f"anneal_fraction={self.anneal_fraction!r} must be a number in (0, 1]; "
                "to switch annealing off, set final_temperature equal to temperature"
            )
        for field in fields(self):
            # Plain floats: a numpy scalar would reach configurations and logs, which are JSON.
            object.__setattr__(self, field.name, float(getattr(self, field.name)))

    @classmethod
    def from_target(
        cls,
        target_e: float,
        *,
        oracle_weight: float = 0.0,
        balance_weight: float = 0.4,
        temperature: float | None = None,
        entropy_weight: float | None = None,
    ) -> Control:
        """Return the settings that reach a target E, given O and B.

        E fixes only the product T*H = E*(O+B). Unless one of the two is given, the product is
        split geometrically through the paper's T = 3.0, H = 0.10 (Table 4):
        T = 3*sqrt(T*H / 0.3). This comes within 23 % of every pair (T, H) that Table 1 prints,
        and within 10 % of all but the first.

        Args:
            target_e: The wanted E, finite and > 0.
            oracle_weight: O >= 0.
            balance_weight: B >= 0; O+B must be > 0.
            temperature: T, if it is to be fixed; H follows.
            entropy_weight: H, if it is to be fixed; T follows.

        Raises:
            ValueError: A value breaks its rule above; T and H are both given and do not give the
                target; or the T or H that follows is beyond the range of floats.

        Example:
            >>> control = Control.from_target(0.545, oracle_weight=0.15, balance_weight=0.40)
            >>> round(control.temperature, 2), round(control.entropy_weight, 3)
            (3.0, 0.1)
            >>> round(Control.from_target(0.545, temperature=2.0).entropy_weight, 3)
            0.109
        """
        _require_positive("target_e", target_e, "choose one, such as 0.545")
        _require_weight("oracle_weight", oracle_weight)
        _require_weight("balance_weight", balance_weight)
        opposition = oracle_weight + balance_weight
        if opposition == 0:
            raise ValueError(
                f"{oracle_weight=} + {balance_weight=} must be > 0 to reach the finite "
                f"{target_e=}, for E = T*H/(O+B); raise balance_weight"
            )
        if temperature is not None:
            _require_positive("temperature", temperature, "or leave it out and it follows")
        if entropy_weight is not None:
            _require_positive("entropy_weight", entropy_weight, "or leave it out and it follows")

        product = target_e * opposition
        if not sys.float_info.min <= product < math.inf:
            raise ValueError(
                f"{target_e=} * (O+B)={opposition!r} must be within the range of floats; "
                "choose values nearer to 1"
            )
        if temperature is None:
            temperature = (
                product / entropy_weight
                if entropy_weight is not None
                else _REFERENCE_TEMPERATURE * math.sqrt(product / _REFERENCE_PRODUCT)
            )
        if entropy_weight is None:
            entropy_weight = product / temperature

        control = cls(
            temperature=temperature,
            entropy_weight=entropy_weight,
            oracle_weight=oracle_weight,
            balance_weight=balance_weight,
        )
        if not math.isclose(control.e, target_e, rel_tol=1e-6):
            raise ValueError(
                f"{temperature=} and {entropy_weight=} give E={control.e:.6g} and must give "
                f"{target_e=}: two of the three determine the third; leave one out"
            )
        return control

    @property
    def e(self) -> float:
        """The nominal E, at the initial temperature; infinite when O+B = 0."""
        return self._e(self.temperature)

    @property
    def phase(self) -> Phase:
        """The phase predicted from the nominal E."""
        return phase_of(self.e)

    @property
    def usage_floor(self) -> float:
        """Share of uniform usage that the balance loss sustains: 0.5 in the healthy phase.

        It falls in proportion through sub-health to 0 where collapse begins. That E decides who is
        kept alive is a rule of this package, not a law that E obeys by itself: by the paper's
        losses alone experts die at any E (docs/evidence.md).

        Example:
            >>> [round(Control.from_target(e).usage_floor, 2) for e in (0.1, 0.3, 0.545, 2.3)]
            [0.0, 0.17, 0.5, 0.5]
        """
        share = (self.e - COLLAPSE_E) / (HEALTHY_E - COLLAPSE_E)
        return _FLOOR * min(max(share, 0.0), 1.0)

    def effective_e(
        self,
        num_classes: int,
        *,
        complexity: Literal["log", "sqrt"] | Callable[[int], float] = "log",
        reference_classes: int = 100,
    ) -> float:
        """Return E_eff = E / f(C), E corrected for a task of C classes (section 5, equation 3).

        f is normalised to 1 at the reference: 100 classes is the largest task on which the paper
        saw no dead expert at E = 0.545 (Table 5). The paper leaves f open, and its own data bound
        its use: raising E to 1.0 on 200 classes did not bring the dead experts back (Table 6).

        Args:
            num_classes: C, at least 2.
            complexity: f before its normalisation: "log", "sqrt", or a function of C that
                returns a finite number > 0.
            reference_classes: The C with f(C) = 1, at least 2.

        Raises:
            ValueError: A number of classes is not an integer >= 2, `complexity` is unknown, or
                its value is not a finite number > 0.

        Example:
            Table 5's tasks of 10, 100 and 200 classes; in the last one 7 of 16 experts died:

            >>> control = Control.from_target(0.545)
            >>> [round(control.effective_e(c), 2) for c in (10, 100, 200)]
            [1.09, 0.55, 0.47]
        """
        function = _COMPLEXITIES.get(complexity) if isinstance(complexity, str) else complexity
        if not callable(function):
            raise ValueError(
                f"{complexity=} must be 'log', 'sqrt' or a function of the number of classes; "
                "choose one of them"
            )
        scale = _complexity_at(function, "num_classes", num_classes)
        reference = _complexity_at(function, "reference_classes", reference_classes)
        return self.e / (scale / reference)

    def temperature_at(self, progress: float) -> float:
        """Return the temperature after a share of the training (section 3.4).

        It falls by a cosine from the initial to the final temperature and stays there.

        Args:
            progress: The share of training that is done: 0 at its start, 1 at its end and after.

        Raises:
            ValueError: `progress` is NaN, negative or no number.

        Example:
            >>> control = Control.from_target(0.545, temperature=3.0)
            >>> [round(control.temperature_at(p), 2) for p in (0.0, 0.15, 0.3, 1.0)]
            [3.0, 1.65, 0.3, 0.3]
        """
        if not _is_number(progress) or not progress >= 0:
            raise ValueError(f"{progress=} must be a number >= 0; pass steps done / steps in total")
        final = min(self.final_temperature, self.temperature)
        if progress >= self.anneal_fraction:
            return final
        share = 0.5 * (1 - math.cos(math.pi * progress / self.anneal_fraction))
        # Rounding may take the difference an ulp below the end, so that T would rise at the end.
        return max(final, self.temperature - (self.temperature - final) * share)

    def e_at(self, progress: float) -> float:
        """Return E(t), at the temperature after a share of the training; see `temperature_at`.

        Raises:
            ValueError: `progress` is NaN, negative or no number.

        Example:
            A run that starts healthy ends, by the formula, far below the threshold of collapse:

            >>> control = Control.from_target(0.545, temperature=3.0)
            >>> [round(control.e_at(p), 4) for p in (0.0, 0.15, 1.0)]
            [0.545, 0.2998, 0.0545]
        """
        return self._e(self.temperature_at(progress))

    def _e(self, temperature: float) -> float:
        return control_parameter(
            temperature=temperature,
            entropy_weight=self.entropy_weight,
            oracle_weight=self.oracle_weight,
            balance_weight=self.balance_weight,
        )


def _is_number(value: object) -> bool:
    # A bool is an int to Python, and never what was meant by a temperature or a weight.
    return isinstance(value, Real) and not isinstance(value, bool)


def _require_positive(name: str, value: float, remedy: str) -> None:
    if not _is_number(value) or not 0 < value < LARGEST:
        raise ValueError(
            f"{name}={value!r} must be a finite number > 0 (and below {LARGEST:g}); {remedy}"
        )


def _require_weight(name: str, value: float) -> None:
    if not _is_number(value) or not 0 <= value < LARGEST:
        raise ValueError(
            f"{name}={value!r} must be a finite number >= 0 (and below {LARGEST:g}); "
            "0 switches it off"
        )


def _complexity_at(function: Callable[[int], float], name: str, num_classes: int) -> float:
    if not isinstance(num_classes, int) or isinstance(num_classes, bool) or num_classes < 2:
        raise ValueError(
            f"{name}={num_classes!r} must be an integer >= 2; count the classes of the task"
        )
    value = function(num_classes)
    if not _is_number(value) or not 0 < value < math.inf:
        raise ValueError(
            f"complexity({num_classes})={value!r} must be a finite number > 0; "
            "choose a function that is positive from 2 classes on"
        )
    return value
