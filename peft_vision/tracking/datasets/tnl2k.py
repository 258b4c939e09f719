"""TNL2K (Wang et al., CVPR 2021): `<sequence>/{imgs/, groundtruth.txt, language.txt}`."""

from __future__ import annotations

from pathlib import Path

from peft_vision.errors import DataError
from peft_vision.tracking.datasets._files import (
    boxes_of,
    folders_in,
    listed_frames,
    require_same,
    with_area,
)
from peft_vision.tracking.sequence_set import SequenceSet, opened_now
from peft_vision.tracking.sequences import TrackingSequence

NAME = "tnl2k"
DIALECT = "otb"
SPLITS = ("train", "test")


def recognizes(root: Path) -> bool:
    """Whether there are sequences with imgs and a description, in the root or in its splits."""
    folders = (root, *_splits(root).values())
    return any(_is_sequence(below) for folder in folders for below in folders_in(folder))


def read(root: Path, split: str | None) -> SequenceSet:
    """Read a split: the folder whose name says train or test, or else the root itself.

    Without a split: test, else train, else the root, which is called test.

    Raises:
        DataError: there is no such split, or no sequence can be used.
    """
    found = _splits(root)
    if not found:
        found = {split or "test": root}
    chosen = split or ("test" if "test" in found else "train")
    if chosen not in found:
        raise DataError(f"{root} has no folder of the split {chosen}; found: {', '.join(found)}.")
    folders = {folder.name: folder for folder in folders_in(found[chosen])}
    sequences, broken = opened_now(folders, lambda name: _opened(folders[name]), str(found[chosen]))
    return SequenceSet(NAME, chosen, sequences, DIALECT, broken)


def _splits(root: Path) -> dict[str, Path]:
    """Folders named for a split (TNL2K_test_subset); a sequence may have the word in its name."""
    return {
        split: folder
        for folder in folders_in(root)
        for split in SPLITS
        if split in folder.name.lower() and not (folder / "imgs").is_dir()
    }


def _is_sequence(folder: Path) -> bool:
    return (folder / "imgs").is_dir() and (folder / "language.txt").is_file()


def _opened(folder: Path) -> TrackingSequence:
    boxes = boxes_of(folder / "groundtruth.txt")
    frames = listed_frames(folder / "imgs")
    require_same(folder.name, len(frames), len(boxes))
    return TrackingSequence(folder.name, frames, boxes, with_area(boxes))
