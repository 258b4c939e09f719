"""Fashion-MNIST as an image folder, from its four idx files (Debian: dataset-fashion-mnist).

python -m benchmarks.fashion_mnist FOLDER_OF_IDX_FILES OUT --train 3000 --test 10000
"""

from __future__ import annotations

import argparse
import gzip
from pathlib import Path

import numpy as np
from PIL import Image

NAMES = ("t-shirt", "trouser", "pullover", "dress", "coat")
NAMES += ("sandal", "shirt", "sneaker", "bag", "ankle-boot")  # in the order of the labels


def write(source: Path, stem: str, count: int, target: Path) -> int:
    """The first `count` images of a split as PNG files, a folder per class."""
    images = _read(source / f"{stem}-images-idx3-ubyte.gz", 16).reshape(-1, 28, 28)[:count]
    labels = _read(source / f"{stem}-labels-idx1-ubyte.gz", 8)[:count]
    for name in NAMES:
        (target / name).mkdir(parents=True, exist_ok=True)
    for number, (pixels, label) in enumerate(zip(images, labels, strict=True)):
        Image.fromarray(pixels).save(target / NAMES[label] / f"{number:05d}.png")
    return len(labels)


def _read(file: Path, offset: int) -> np.ndarray:
    return np.frombuffer(gzip.decompress(file.read_bytes()), np.uint8, offset=offset)


def main() -> None:
    """Write both splits."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--train", type=int, default=3000)
    parser.add_argument("--test", type=int, default=10_000)
    asked = parser.parse_args()
    train = write(asked.source, "train", asked.train, asked.target / "train")
    test = write(asked.source, "t10k", asked.test, asked.target / "val")
    print(f"{asked.target}: {train} training and {test} test images of {len(NAMES)} classes")


if __name__ == "__main__":
    main()
