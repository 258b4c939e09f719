"""LaSOT (Fan et al., CVPR 2019): `<class>/<class>-<k>/{img/00000001.jpg, groundtruth.txt, ...}`.

Boxes are counted from 1; what is read counts from 0. A frame is visible where neither
full_occlusion.txt nor out_of_view.txt flags it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from peft_vision.errors import DataError
from peft_vision.tracking.datasets._files import (
    FolderFrames,
    Numbered,
    boxes_of,
    folders_in,
    labels_of,
    listed_frames,
    require_same,
    text_of,
)
from peft_vision.tracking.sequence_set import LazySequences, SequenceSet, opened_now
from peft_vision.tracking.sequences import TrackingSequence

NAME = "lasot"
DIALECT = "otb"
SPLITS = ("train", "test")

ORIGIN = 1.0
"""What the groundtruth calls the first pixel."""

LISTS = {"train": "training_set.txt", "test": "testing_set.txt"}
LONGER = frozenset({"monkey-17"})
"""Published with more frames than rows of groundtruth; the frames behind the last row are left."""

EXTENSION = frozenset(
    [
        "atv",
        "badminton",
        "cosplay",
        "dancingshoe",
        "footbag",
        "frisbee",
        "jianzi",
        "lantern",
        "misc",
        "opossum",
        "paddle",
        "raccoon",
        "rhino",
        "skatepark",
        "wingsuit",
    ]
)
"""Classes of the extension, which have a reader of their own."""

_FLAGS = ("full_occlusion.txt", "out_of_view.txt")


def recognizes(root: Path) -> bool:
    """Whether class folders hold sequences with LaSOT's flag files, and not the extension's."""
    return class_of_first(root) not in EXTENSION | {None}


def read(root: Path, split: str | None) -> SequenceSet:
    """Read a split by its list of names; without a split: test, or all where there is no list.

    Raises:
        DataError: the list of the split is missing, or no sequence can be used.
    """
    lists = {name: root / file for name, file in LISTS.items() if (root / file).is_file()}
    if split is None and not lists:
        names = [folder.name for folder in sequence_folders(root)]
        sequences, broken = opened_now(names, lambda name: _opened(root, name), str(root))
        return SequenceSet(NAME, "all", sequences, DIALECT, broken)
    chosen = split or ("test" if "test" in lists else "train")
    if chosen not in lists:
        raise DataError(
            f"{root} lacks {LISTS.get(chosen, chosen)}, the names of the split {chosen}. Put the "
            "file of the LaSOT toolkit there, or read all sequences with no split where neither "
            "list is there."
        )
    names = text_of(lists[chosen]).split()
    if chosen == "train":
        lazily = LazySequences(names, partial(_for_training, root, names))
        return SequenceSet(NAME, chosen, lazily, DIALECT)
    sequences, broken = opened_now(names, lambda name: _opened(root, name), str(lists[chosen]))
    return SequenceSet(NAME, chosen, sequences, DIALECT, broken)


def sequence_folders(root: Path) -> list[Path]:
    """The folders `<class>-<k>`, in class folders or in the root itself, in order of class and k.

    A folder counts where at least one of the flag files lies in it.
    """
    return sorted(_walked(root), key=lambda path: _place(path.name))


def class_of_first(root: Path) -> str | None:
    """The class of any one sequence; None where there is none."""
    found = next(_walked(root), None)
    return None if found is None else _place(found.name)[0]


def opened(folder: Path, origin: float) -> TrackingSequence:
    """One sequence with its frames listed.

    Args:
        origin: what its groundtruth calls the first pixel.

    Raises:
        DataError: a file is missing, not numbers, or the counts differ.
    """
    boxes = boxes_of(folder / "groundtruth.txt", origin)
    frames = listed_frames(folder / "img")
    if folder.name in LONGER:
        frames = FolderFrames(frames.folder, frames.names[: len(boxes)])
    require_same(folder.name, len(frames), len(boxes))
    return TrackingSequence(folder.name, frames, boxes, _visible(folder, len(boxes)))


def _opened(root: Path, name: str) -> TrackingSequence:
    return opened(_folder(root, name), ORIGIN)


def _for_training(root: Path, names: Sequence[str], index: int) -> TrackingSequence:
    """The folder is not listed: there is a frame per row, and reading a missing one says so."""
    name = names[index]
    folder = _folder(root, name)
    boxes = boxes_of(folder / "groundtruth.txt", ORIGIN)
    frames = FolderFrames(folder / "img", Numbered("{:08d}.jpg", 1, len(boxes)))
    return TrackingSequence(name, frames, boxes, _visible(folder, len(boxes)))


def _folder(root: Path, name: str) -> Path:
    """Where a sequence lies.

    Raises:
        DataError: nowhere.
    """
    nested, flat = root / name.rpartition("-")[0] / name, root / name
    for folder in (nested, flat):
        if folder.is_dir():
            return folder
    raise DataError(f"The sequence {name} is listed, and there is neither {nested} nor {flat}.")


def _visible(folder: Path, count: int) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    visible = np.ones(count, dtype=np.bool_)
    for name in _FLAGS:
        if (folder / name).is_file():
            visible &= labels_of(folder / name, count) == 0
    return visible


def _walked(root: Path) -> Iterator[Path]:
    for folder in folders_in(root):
        if _is_sequence(folder):
            yield folder
        else:
            yield from (below for below in folders_in(folder) if _is_sequence(below))


def _is_sequence(folder: Path) -> bool:
    kind, _, number = folder.name.rpartition("-")
    named = bool(kind) and number.isdigit()
    return named and any((folder / name).is_file() for name in _FLAGS)


def _place(name: str) -> tuple[str, int]:
    kind, _, number = name.rpartition("-")
    return kind, int(number)
