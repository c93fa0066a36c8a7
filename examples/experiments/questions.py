"""Questions that the paper leaves open, as experiments of the same form."""

from __future__ import annotations

import math
import random
from dataclasses import replace

from examples.experiments.records import HEALTHY, TEN, Experiment, Setting, control, target


def _random_settings(count: int, *, seed: int = 0) -> tuple[Setting, ...]:
    draw = random.Random(seed)

    def log_uniform(low: float, high: float) -> float:
        return round(math.exp(draw.uniform(math.log(low), math.log(high))), 4)

    return tuple(
        Setting(
            name=f"sample {index}",
            data="cifar10",
            effort=0.5,
            percents=(50, 100),
            control=control(
                log_uniform(0.5, 6.0),
                log_uniform(0.005, 0.5),
                o=log_uniform(0.01, 1.0),
                b=log_uniform(0.01, 1.0),
            ),
        )
        for index in range(count)
    )


def _revival() -> tuple[Setting, ...]:
    every = tuple(range(30, 101, 2))
    death = {"data": "cifar10", "forced_death": (0.4, 0.5), "percents": every}
    return (
        Setting(
            name="the package's defaults",
            control=target(0.545, o=0.0),
            strength=None,
            warmup=0.0,
            **death,
        ),
        Setting(name="balance loss, the paper's weights", control=HEALTHY, **death),
        Setting(
            name="balance loss, a tenth of the weights", control=HEALTHY, strength=0.1, **death
        ),
        Setting(name="no balance loss, O = 0.15", control=control(3.0, 0.10, b=0.0), **death),
        Setting(name="none of the losses", control=HEALTHY, strength=0.0, **death),
    )


def _promise() -> tuple[Setting, ...]:
    return tuple(
        Setting(
            name=f"{data}, tiers {':'.join(map(str, tiers))}, learning rates x {rate:g}",
            data=data,
            control=target(e, o=0.0),
            tiers=tiers,
            strength=None,
            warmup=0.0,
            rate=rate,
            effort=effort,
            percents=(50, 100),
        )
        for data, effort in (("cifar10", 1 / 3), ("wikitext2", 1.0))
        for tiers, e in (((8, 4, 4), 0.545), ((4, 4, 4, 4), 1.0), ((16,), 0.5), ((16, 8, 8), 0.545))
        for rate in (0.3, 1.0, 3.0)
    )


QUESTIONS = (
    Experiment(
        name="predicts-collapse",
        title="Does E predict collapse? Random T, H, O and B",
        section="3.2",
        claim="E ranks outcomes better than each of T, H, O, B, T*H and O+B alone",
        settings=_random_settings(60),
        paper=False,
        note="Drawn log-uniformly: T from 0.5 to 6, H from 0.005 to 0.5, O and B from 0.01 to 1.",
    ),
    Experiment(
        name="revival",
        title="An expert held below selection for a while, then released",
        section="4.7, 5",
        claim="a dead expert revives with balance loss, and never without it",
        settings=_revival(),
        seeds=3,
        paper=False,
    ),
    Experiment(
        name="e-order",
        title="CIFAR-10 at E from 0.1 to 2.3, the layer's other defaults",
        section="4.1, 4.4",
        claim="living and PURE_CORE experts do not fall as E rises",
        settings=tuple(
            replace(
                TEN,
                name=f"E={e:g}",
                control=target(e, o=0.0),
                strength=None,
                warmup=0.0,
                effort=1 / 3,
                percents=(50, 100),
            )
            for e in (0.1, 0.3, 0.545, 1.0, 2.3)
        ),
        seeds=3,
        paper=False,
        note="The weights are the package's, and so is the rule that E sets the usage floor.",
    ),
    Experiment(
        name="promise",
        title="The layer's defaults over tiers, 16 and 32 experts, learning rates, two tasks",
        section="4.2, 4.3",
        claim="no expert is dead on either basis at the end of any run at E >= 0.5 (relative "
        "thresholds)",
        settings=_promise(),
        paper=False,
        note="Here the weights are the package's: its default strength, no oracle, no warm-up.",
    ),
    Experiment(
        name="start",
        title="Experts that start alike or apart, the layer's other defaults",
        section="3.1",
        claim="experts that start alike learn faster than experts drawn each for itself",
        settings=tuple(
            Setting(
                name=f"{data}, spread {spread:g}",
                data=data,
                control=target(0.545, o=0.0),
                strength=None,
                spread=spread,
                warmup=0.0,
                effort=1 / 3,
                percents=(50, 100),
            )
            for data in ("cifar10", "wikitext2")
            for spread in (1.0, 0.1, 0.01, 0.0)
        ),
        seeds=3,
        paper=False,
    ),
    Experiment(
        name="class-count",
        title="The same images under 2 to 80 classes, at five values of E",
        section="5, equation 3",
        claim="the E at which deaths begin rises with the number of classes C, as f(C)",
        settings=tuple(
            Setting(
                name=f"C={count}, E={e:g}",
                data=f"classes-{count}",
                control=target(e),
                effort=0.5,
                percents=(50, 100),
            )
            for count in (2, 5, 10, 40, 80)
            for e in (0.05, 0.1, 0.3, 0.545, 1.0)
        ),
        seeds=3,
        paper=False,
    ),
)
