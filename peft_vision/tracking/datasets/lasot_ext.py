"""LaSOT's extension (Fan et al., IJCV 2021): 15 new classes of 10 sequences, laid out as LaSOT.

Its boxes are counted from 0.
"""

from __future__ import annotations

from pathlib import Path

from peft_vision.tracking.datasets import lasot
from peft_vision.tracking.sequence_set import SequenceSet, opened_now

NAME = "lasot_ext"
DIALECT = "otb"
SPLITS = ("test",)


def recognizes(root: Path) -> bool:
    """Whether the class folders are those of the extension."""
    return lasot.class_of_first(root) in lasot.EXTENSION


def read(root: Path, split: str | None) -> SequenceSet:
    """Read all sequences; the only split is test.

    Raises:
        DataError: no sequence can be used.
    """
    folders = {folder.name: folder for folder in lasot.sequence_folders(root)}
    sequences, broken = opened_now(
        folders, lambda name: lasot.opened(folders[name], origin=0.0), str(root)
    )
    return SequenceSet(NAME, split or "test", sequences, DIALECT, broken)
