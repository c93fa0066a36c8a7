"""The paper's five data sets, and their stand-ins on a small machine.

At paper scale the named set comes from the hub. Below it, every set is made from the images and
the text at hand: more classes by clustering the images of each class, fewer by merging classes.

Axes: B images, L positions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from examples import data as source
from examples.data import Images
from examples.experiments.records import Scale

HUB = {
    "cifar10": "uoft-cs/cifar10",
    "cifar100": "uoft-cs/cifar100",
    "tinyimagenet": "zh-plus/tiny-imagenet",
    "wikitext2": "wikitext-2-raw-v1",
    "wikitext103": "wikitext-103-raw-v1",
}
CLASSES = {"cifar10": 10, "cifar100": 100, "tinyimagenet": 200}
TEXTS = ("wikitext2", "wikitext103")


@dataclass(frozen=True)
class Samples:
    """What a run trains and is tested on: inputs and targets of equal length.

    Attributes:
        name: Where it comes from, in words.
        kind: ``"vision"`` or ``"language"``.
        train: Images ``(B, C, height, width)`` and labels ``(B,)``, or ids ``(B, L)`` and the ids
            that follow them.
        test: The same, unseen in training.
        classes: Classes, or ids of the vocabulary.
    """

    name: str
    kind: str
    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    classes: int


class Library:
    """Loads each set once, from the sources that the user gave or from the hub.

    Args:
        sources: As for `examples.data.load`; empty for what every machine has.
        scale: Decides sizes and whether the named sets are used.
    """

    def __init__(self, sources: list[str], scale: Scale) -> None:
        self.sources = sources
        self.scale = scale
        self._loaded: dict[str, Samples] = {}
        self._local: tuple[Images, source.Text] | None = None

    def get(self, name: str) -> Samples:
        """Return a set by its name: one of `HUB`, or ``"classes-C"`` for C classes."""
        if name not in self._loaded:
            if name in TEXTS:
                self._loaded[name] = self._text(name)
            elif self.scale.named_sets and name in HUB:
                images, _ = source.load([HUB[name]], max_images=None)
                self._loaded[name] = self._images(images)
            else:
                stand_in = self.scale.classes.get(name, CLASSES.get(name))
                count = stand_in or int(name.removeprefix("classes-"))
                self._loaded[name] = self._images(relabel(self._at_hand()[0], count))
        return self._loaded[name]

    def _at_hand(self) -> tuple[Images, source.Text]:
        if self._local is None:
            self._local = source.load(self.sources)
            images, text = self._local
            few = Images(
                images.name,
                tuple(part[: self.scale.train_images] for part in images.train),  # type: ignore[arg-type]
                tuple(part[: self.scale.test_images] for part in images.test),  # type: ignore[arg-type]
                images.classes,
            )
            self._local = few, text
        return self._local

    def _images(self, images: Images) -> Samples:
        def sized(pixels: Tensor) -> Tensor:
            side = self.scale.image_pixels
            if side is None or pixels.shape[-1] <= side:
                return pixels
            return F.interpolate(pixels, size=(side, side), mode="area")

        (train, train_labels), (test, test_labels) = images.train, images.test
        return Samples(
            name=images.name,
            kind="vision",
            train=(sized(train), train_labels.long()),
            test=(sized(test), test_labels.long()),
            classes=len(images.classes),
        )

    def _text(self, name: str) -> Samples:
        scale = self.scale
        if scale.named_sets:
            train, test, vocabulary = _wikitext(HUB[name])
            label = f"{name}, GPT-2 tokens"
        else:
            text = self._at_hand()[1]
            train, test, vocabulary = text.train, text.test, 256
            label = f"{text.name}, bytes"
            # The smaller set is the first part of the larger one.
            limit = scale.train_tokens // (4 if name == "wikitext2" else 1)
            train, test = train[:limit], test[: scale.test_tokens]
        # The large set trains on blocks at random places, the small one on consecutive ones.
        scattered = name == "wikitext103"
        return Samples(
            name=label,
            kind="language",
            train=blocks(train, scale.context, scattered=scattered),
            test=blocks(test, scale.context),
            classes=vocabulary,
        )


def blocks(ids: Tensor, context: int, *, scattered: bool = False) -> tuple[Tensor, Tensor]:
    """Cut a text into inputs and the ids that follow them, each ``(B, context)``."""
    count = (len(ids) - 1) // context
    if count < 1:
        raise ValueError(f"the text has {len(ids)} tokens; it must exceed the context {context}")
    starts = torch.arange(count) * context
    if scattered:
        generator = torch.Generator().manual_seed(0)
        starts = torch.randint(len(ids) - context, (count,), generator=generator)
    places = starts[:, None] + torch.arange(context)
    return ids[places], ids[places + 1]


def relabel(images: Images, count: int, *, seed: int = 0) -> Images:
    """Return the same images under ``count`` classes.

    Fewer classes merge neighbours (class c becomes ``c * count // C``). More classes split each one
    by k-means over coarse pixels, fitted on the training images; ``count`` is then a multiple of C.

    Raises:
        ValueError: ``count`` is below 2, or above C and no multiple of it.
    """
    known = len(images.classes)
    if count == known:
        return images
    if count < 2 or (count > known and count % known):
        raise ValueError(
            f"{count} classes cannot be made of {known}; choose 2 to {known} or a multiple"
        )
    (train, train_labels), (test, test_labels) = images.train, images.test
    if count < known:
        merged = (train_labels * count // known, test_labels * count // known)
        return Images(
            f"{images.name}, merged into {count} classes",
            (train, merged[0]),
            (test, merged[1]),
            [str(label) for label in range(count)],
        )
    from sklearn.cluster import KMeans

    parts = count // known
    fine = (train_labels * parts, test_labels * parts)
    coarse = [F.adaptive_avg_pool2d(pixels, 4).flatten(1).numpy() for pixels in (train, test)]
    for label in range(known):
        rows = [(labels == label).nonzero().squeeze(1) for labels in (train_labels, test_labels)]
        clusters = KMeans(parts, n_init=1, random_state=seed).fit(coarse[0][rows[0]])
        for split in (0, 1):
            if len(rows[split]):
                found = torch.as_tensor(clusters.predict(coarse[split][rows[split]])).long()
                fine[split][rows[split]] += found
    return Images(
        f"{images.name}, split into {count} classes",
        (train, fine[0]),
        (test, fine[1]),
        [str(label) for label in range(count)],
    )


def _wikitext(configuration: str) -> tuple[Tensor, Tensor, int]:
    from datasets import load_dataset
    from transformers import AutoTokenizer

    parts = load_dataset("Salesforce/wikitext", configuration)
    tokenizer = AutoTokenizer.from_pretrained("gpt2")
    train, test = (
        torch.tensor([i for ids in tokenizer(list(parts[split]["text"]))["input_ids"] for i in ids])
        for split in ("train", "test")
    )
    return train, test, len(tokenizer)
