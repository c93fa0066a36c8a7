"""Images and text to train on: your own files, a hub name, or what every machine already has.

Without a source, images are scikit-learn's handwritten digits and text is the Python standard
library's own source code, read as bytes.
"""

from __future__ import annotations

import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

MAX_IMAGES = 12_000
MAX_BYTES = 4_000_000


@dataclass(frozen=True)
class Images:
    """Classified images in [-1, 1], ``(B, C, H, W)``, and their labels, ``(B,)``."""

    name: str
    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    classes: list[str]


@dataclass(frozen=True)
class Text:
    """Text as bytes, ``(length,)`` int64 in [0, 255]."""

    name: str
    train: Tensor
    test: Tensor


def load(sources: list[str], *, max_images: int | None = MAX_IMAGES) -> tuple[Images, Text]:
    """Return images and text from ``sources``, each with its default where no source holds it.

    A source is a folder or file of parquet images, a text file, or the name of a hub data set.
    ``max_images`` bounds each split.
    """
    images, text = None, None
    for source in sources:
        path = Path(source)
        if path.is_dir() and any(path.rglob("*.parquet")):
            images = _parquet_images(path, max_images)
        elif path.suffix == ".parquet" and path.is_file():
            images = _parquet_images(path.parent, max_images)
        elif path.is_file():
            text = _split_text(path.name, path.read_bytes())
        elif path.exists():
            raise ValueError(
                f"--data {source} is a folder without parquet files; name a folder with train and "
                "test parquet files, or one text file"
            )
        else:
            loaded = _from_hub(source, max_images)
            if isinstance(loaded, Images):
                images = loaded
            else:
                text = loaded
    return images or digits(), text or standard_library()


def digits() -> Images:
    """Return scikit-learn's 1,797 handwritten digits, 8 x 8 pixels, a fifth of them for testing."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = torch.tensor(bunch.images, dtype=torch.float32).unsqueeze(1) / 8.0 - 1.0
    labels = torch.tensor(bunch.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    test, train = order[:360], order[360:]
    return Images(
        name="handwritten digits",
        train=(images[train], labels[train]),
        test=(images[test], labels[test]),
        classes=[str(digit) for digit in range(10)],
    )


def standard_library() -> Text:
    """Return the source of the running Python's standard library, its top-level modules."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    return _split_text("Python standard library", b"".join(file.read_bytes() for file in files))


def _split_text(name: str, content: bytes) -> Text:
    if len(content) < 20_000:
        raise ValueError(
            f"--data {name} holds {len(content)} bytes; training needs at least 20,000: give a "
            "longer text"
        )
    data = torch.frombuffer(bytearray(content[:MAX_BYTES]), dtype=torch.uint8).long()
    cut = len(data) * 9 // 10
    return Text(name, data[:cut], data[cut:])


def _parquet_images(folder: Path, max_images: int | None) -> Images:
    from datasets import load_dataset

    files = {}
    for split in ("train", "test"):
        found = sorted(str(file) for file in folder.rglob(f"*{split}*.parquet"))
        if not found:
            raise ValueError(f"--data {folder} has no *{split}*.parquet; it needs train and test")
        files[split] = found
    parts = load_dataset("parquet", data_files=files)
    return _images(folder.name, parts["train"], parts["test"], max_images)


def _from_hub(name: str, max_images: int | None) -> Images | Text:
    from datasets import load_dataset

    try:
        parts = load_dataset(name)
    except Exception as error:
        raise ValueError(
            f"--data {name} is no file, no folder, and could not be loaded from the hub ({error}); "
            "check the spelling, or leave --data out"
        ) from error
    tests = [key for key in ("test", "validation", "valid") if key in parts]
    if "train" not in parts or not tests:
        raise ValueError(
            f"--data {name} has the splits {', '.join(parts)}; it needs train, and test or "
            "validation: choose another set"
        )
    test = parts[tests[0]]
    if "text" in test.features:
        lines = "\n".join([*parts["train"]["text"], *test["text"]])
        return _split_text(name, lines.encode())
    return _images(name, parts["train"], test, max_images)


def _images(name: str, train, test, max_images: int | None) -> Images:  # type: ignore[no-untyped-def]
    keys = []
    for names in (("label", "labels", "fine_label"), ("image", "img")):
        present = [key for key in names if key in train.features]
        if not present:
            raise ValueError(
                f"--data {name} has the columns {', '.join(train.features)}; it needs one called "
                f"{' or '.join(names)}: rename yours"
            )
        keys.append(present[0])
    label_key, image_key = keys
    label = train.features[label_key]
    classes = getattr(label, "names", None) or [str(c) for c in sorted(set(train[label_key]))]

    def tensors(part) -> tuple[Tensor, Tensor]:  # type: ignore[no-untyped-def]
        part = part.select(range(min(len(part), max_images or len(part)))).with_format("torch")
        pixels = list(part[image_key])
        colours = max(len(image) for image in pixels)  # some sets mix grey and colour images
        pixels = [image.expand(colours, -1, -1) for image in pixels]
        if len(sizes := {tuple(image.shape) for image in pixels}) > 1:
            raise ValueError(
                f"--data {name} has images of {len(sizes)} sizes; all must be of one: resize them"
            )
        return torch.stack(pixels).float() / 127.5 - 1.0, torch.as_tensor(part[label_key])

    return Images(name, tensors(train), tensors(test), list(classes))
