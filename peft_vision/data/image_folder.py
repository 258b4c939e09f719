"""A folder with one subfolder per class, or with train/ and validation folders of that kind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from peft_vision.data.images import LabeledImages, Pictures
from peft_vision.errors import DataError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm")
TRAIN_NAMES = ("train", "training")
VALIDATION_NAMES = ("val", "validation", "valid", "test")

_LAYOUT = (
    "A folder with one subfolder of images per class works, or one with train/ and val/ "
    "(validation/, test/) folders of that kind."
)


@dataclass(frozen=True)
class FolderPictures(Pictures):
    """Image files below `root`."""

    root: Path
    paths: tuple[Path, ...]

    def __len__(self) -> int:
        """How many files there are."""
        return len(self.paths)

    def encoded(self, index: int) -> bytes:
        """The content of a file."""
        return self.paths[index].read_bytes()

    def name(self, index: int) -> str:
        """The path below the root."""
        return str(self.paths[index].relative_to(self.root))


def splits(root: Path) -> dict[str, Path]:
    """The folders `train` and `validation` of `root`; `all` is the root where it has neither.

    A *class* that happens to be called train or test is told apart by what lies in it: images,
    where a split holds class folders.

    Raises:
        DataError: `root` is missing, not a folder, or empty.
    """
    if not root.exists():
        raise DataError(f"There is no data folder {root}. {_LAYOUT}")
    if not root.is_dir():
        raise DataError(f"{root} is a file, not a data folder. {_LAYOUT}")
    below = {path.name.lower(): path for path in _folders(root)}
    if not below and not any(root.iterdir()):
        raise DataError(f"The data folder {root} is empty. {_LAYOUT}")
    found: dict[str, Path] = {}
    for split, names in (("train", TRAIN_NAMES), ("validation", VALIDATION_NAMES)):
        for name in names:
            if name in below and split not in found and _folders(below[name]):
                found[split] = below[name]
    return found or {"all": root}


def read_folder(
    folder: Path, *, root: Path | None = None, one_class: bool = False
) -> LabeledImages:
    """The images of a folder with one subfolder per class; images may lie deeper than one level.

    Args:
        folder: holds the class folders.
        root: names in messages are relative to it.
        one_class: accept a single class, as evaluation may meet it.

    Raises:
        DataError: no class folders, no images, an empty class, or one class only.
    """
    classes = _folders(folder)
    if not classes:
        loose = sum(path.suffix.lower() in EXTENSIONS for path in folder.iterdir())
        raise DataError(f"{folder} has no class folders ({loose} images lie in it). {_LAYOUT}")
    paths: list[Path] = []
    targets: list[int] = []
    empty: list[str] = []
    for number, name in enumerate(classes):
        found = _images(name)
        paths += found
        targets += [number] * len(found)
        if not found:
            empty.append(name.name)
    if not paths:
        raise DataError(
            f"{folder} has the class folders {_some([c.name for c in classes])} but no images in "
            "them. "
            f"Files ending in {', '.join(EXTENSIONS[:6])} count as images."
        )
    if empty:
        raise DataError(
            f"{folder} has class folders without images: {_some(empty)}. Remove them or fill them."
        )
    if len(classes) < 2 and not one_class:
        raise DataError(
            f"{folder} has one class only ({classes[0].name}), with {len(paths)} images. "
            "Training a classifier needs at least two class folders."
        )
    names = tuple(name.name for name in classes)
    pictures = FolderPictures(root or folder, tuple(paths))
    return LabeledImages(pictures, tuple(range(len(paths))), tuple(targets), names, str(folder))


def read_unlabeled(folder: Path) -> LabeledImages:
    """All images below a folder, however they are arranged; no label means anything.

    Raises:
        DataError: there is no such folder, or no image in it.
    """
    if not folder.is_dir():
        raise DataError(f"There is no data folder {folder}. A folder with images in it works.")
    paths = tuple(_images(folder))
    if not paths:
        raise DataError(
            f"{folder} has no images. Files ending in {', '.join(EXTENSIONS[:6])} count as images."
        )
    count = len(paths)
    pictures = FolderPictures(folder, paths)
    return LabeledImages(pictures, tuple(range(count)), (0,) * count, ("image",), str(folder))


def _folders(folder: Path) -> list[Path]:
    return sorted(
        (path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")),
        key=lambda path: path.name,
    )


def _images(folder: Path) -> list[Path]:
    return sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in EXTENSIONS and path.is_file() and not path.name.startswith(".")
    )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
