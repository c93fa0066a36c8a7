"""What a run is made of: scales, settings and experiments, as plain records.

The symbols are the paper's: E = T * H / (O + B).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from ecomoe import Control

EVERY_TENTH = (1, *range(10, 100, 10))
LAST_TEN = tuple(range(91, 101))


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How large a run is. Everything else is the same code.

    Attributes:
        named_sets: Whether the paper's own data sets are loaded from the hub.
        classes: Classes of the stand-in for a named set, where not the set's own.
        depth, widen, stem, features: The wide residual network.
        image_pixels: Images are averaged down to this side; ``None`` keeps them.
        train_images, test_images: At most so many; ``None`` for all.
        layers, width, heads, expert_hidden, context: The transformer.
        train_tokens, test_tokens: At most so many; a quarter for the smaller of the two text sets.
        epochs: By kind, ``"vision"`` and ``"language"``.
        batch: By kind.
        encoder_lr, expert_lr: Learning rates of the encoder, and of experts, router, prototypes.
        percents: When to evaluate, in hundredths of the training: the paper's epochs.
        temperatures: Of the final temperature scan.
    """

    name: str
    named_sets: bool = False
    classes: dict[str, int] = field(default_factory=dict)
    depth: int = 28
    widen: int = 10
    stem: int = 16
    features: int = 256
    image_pixels: int | None = None
    train_images: int | None = None
    test_images: int | None = None
    layers: int = 8
    width: int = 512
    heads: int = 8
    expert_hidden: int = 1024
    context: int = 256
    train_tokens: int | None = None
    test_tokens: int | None = None
    epochs: dict[str, int] = field(default_factory=lambda: {"vision": 100, "language": 100})
    batch: dict[str, int] = field(default_factory=lambda: {"vision": 128, "language": 64})
    encoder_lr: float = 1e-4
    expert_lr: float = 1e-3
    weight_decay: float = 5e-4
    percents: tuple[int, ...] = EVERY_TENTH + LAST_TEN
    temperatures: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7, 1.0, 2.0, 5.0)


# No result of this scale bears on a claim.
SMOKE = "smoke"
SMOKE_SAID = "Runs of seconds: they show only that the code runs, and decide nothing."

SCALES = {
    scale.name: scale
    for scale in (
        Scale(name="paper", named_sets=True),
        # A few hundred steps train an encoder only at a higher learning rate than the paper's.
        Scale(
            name="small",
            classes={"cifar100": 40, "tinyimagenet": 80},
            depth=10,
            widen=1,
            image_pixels=16,
            train_images=4000,
            test_images=2000,
            layers=4,
            width=128,
            heads=4,
            expert_hidden=128,
            context=128,
            train_tokens=800_000,
            test_tokens=24_000,
            epochs={"vision": 12, "language": 3},
            batch={"vision": 64, "language": 16},
            encoder_lr=1e-3,
        ),
        Scale(
            name=SMOKE,
            classes={"cifar100": 20, "tinyimagenet": 40},
            depth=10,
            widen=1,
            stem=4,
            features=32,
            image_pixels=8,
            train_images=128,
            test_images=128,
            layers=2,
            width=16,
            heads=2,
            expert_hidden=16,
            context=32,
            train_tokens=8_192,
            test_tokens=2_048,
            epochs={"vision": 2, "language": 2},
            batch={"vision": 64, "language": 32},
            encoder_lr=1e-3,
            percents=(50, 100),
            temperatures=(0.1, 5.0),
        ),
    )
}


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One condition of an experiment: everything that decides a run, but scale, data and seed.

    Attributes:
        name: Its name within the experiment.
        data: A set's name; see `examples.experiments.data.Library`.
        control: T, H, O, B and the annealing.
        tiers: Experts by tier.
        ortho_weight: Weight of the prototypes' orthogonality.
        oracle: The teacher, where it is not the layer's default.
        strength: Factor on H, O and B, with the paper's router and without a usage floor;
            ``None`` for the layer's defaults of all three. The paper knows no such factor, so its
            weights are taken as printed.
        spread: How far experts differ at the start; ``None`` for the layer's default where
            ``strength`` is, else 1: the paper says nothing of experts that start alike.
        warmup: Share of the training with random routing.
        effort: Factor on the scale's epochs.
        rate: Factor on both learning rates.
        forced_death: Two shares of the training, between which expert 0 is held below selection.
        percents: When to evaluate, where not at the scale's times.
    """

    name: str
    data: str
    control: Control
    tiers: tuple[int, ...] = (8, 4, 4)
    ortho_weight: float = 0.0
    oracle: str | None = None
    strength: float | None = 1.0
    spread: float | None = None
    warmup: float = 0.15
    effort: float = 1.0
    rate: float = 1.0
    forced_death: tuple[float, float] | None = None
    percents: tuple[int, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """A named set of conditions and what the paper says of them.

    Attributes:
        name: As on the command line.
        title: One line.
        section: Where the paper reports it.
        claim: What the paper found, or what is asked.
        settings: The conditions.
        seeds: As many as the paper ran.
        paper: Whether it is one of the paper's, or a question to it.
        note: What we had to decide, because the paper does not say.
    """

    name: str
    title: str
    section: str
    claim: str
    settings: tuple[Setting, ...]
    seeds: int = 1
    paper: bool = True
    note: str = ""


def control(t: float, h: float, *, o: float = 0.15, b: float = 0.40) -> Control:
    """Return a control from the paper's symbols."""
    return Control(temperature=t, entropy_weight=h, oracle_weight=o, balance_weight=b)


def target(e: float, *, o: float = 0.15, b: float = 0.40) -> Control:
    """Return the control that reaches E at given O and B."""
    return Control.from_target(e, oracle_weight=o, balance_weight=b)


HEALTHY = control(3.0, 0.10)  # E = 0.545, Table 4
TEN = Setting(name="E=0.545", data="cifar10", control=HEALTHY)
