"""Tracking data sets by folder: the layout is named, or recognized."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from peft_vision.errors import DataError
from peft_vision.lookup import stems, unknown
from peft_vision.tracking import synthetic
from peft_vision.tracking.sequence_set import SequenceSet

__all__ = ["SequenceSet", "read_for_training", "read_sequences"]

FOLDER = "tracking/datasets"
OWN = "folder"
"""The layout of one's own data, which is taken where no other is recognized."""

_SHOWN = 8


class _Reader(NamedTuple):
    splits: tuple[str, ...]
    recognizes: Callable[[Path], bool]
    read: Callable[[Path, str | None], SequenceSet]


def read_sequences(
    root: str | Path, kind: str | None = None, split: str | None = None
) -> SequenceSet:
    """Read a tracking data set.

    Args:
        root: folder of the data set as it is published, or one's own: see `datasets/folder.py`.
            "demo/tracking": sequences that are drawn, see `synthetic.py`.
        kind: layout, a stem of `datasets/`; None: recognized by what lies in the folder.
        split: None: the one that is evaluated on, "test" where there is one.

    Raises:
        UnknownName: there is no such kind.
        DataError: the folder is missing, is of no known layout or of several, lacks the split, or
            no sequence of it can be used.
        MissingExtra: the demo data, and packages that it is drawn with are not installed.
    """
    if str(root) == synthetic.NAME:
        return _drawn(kind, split)
    path, name = _place(root, kind)
    return _read(path, name, split)


def read_for_training(
    root: str | Path, kind: str | None = None, split: str | None = None
) -> SequenceSet:
    """The same, but without a split it is "train".

    Raises:
        UnknownName, DataError, MissingExtra: as `read_sequences`; or there is nothing to train on.
    """
    if str(root) == synthetic.NAME:
        return _drawn(kind, split or "train")
    path, name = _place(root, kind)
    splits = _reader(name).splits
    if split is None and "train" not in splits:
        raise DataError(
            f"{name} has no split to train on; it has {', '.join(splits)}. To train on one of "
            f"them all the same, name it: split: {splits[0]}."
        )
    return _read(path, name, split or "train")


def _drawn(kind: str | None, split: str | None) -> SequenceSet:
    if kind is not None:
        raise DataError(f"{synthetic.NAME} has no kind; {kind!r} was asked for.")
    return synthetic.read(split)


def _place(root: str | Path, kind: str | None) -> tuple[Path, str]:
    """The folder, and the name of its layout."""
    path = Path(root).expanduser()
    if kind is not None and kind not in kinds():
        raise unknown("kind of tracking data", kind, kinds())
    if not path.is_dir():
        what = "is a file" if path.exists() else "does not exist"
        raise DataError(
            f"{root} {what}. Possible: the folder of a tracking data set, or {synthetic.NAME}."
        )
    return path, kind or recognized(path)


def _read(path: Path, name: str, split: str | None) -> SequenceSet:
    reader = _reader(name)
    if split is not None and split not in reader.splits:
        raise DataError(f"{name} has no split {split!r}; it has {', '.join(reader.splits)}.")
    return reader.read(path, split)


def kinds() -> list[str]:
    """The layouts that can be read."""
    return list(stems(FOLDER))


def recognized(root: Path) -> str:
    """The kind of a folder by what lies in it.

    Raises:
        DataError: none or several would do.
    """
    found = [kind for kind in kinds() if kind != OWN and _reader(kind).recognizes(root)]
    if not found and _reader(OWN).recognizes(root):
        found = [OWN]
    if len(found) == 1:
        return found[0]
    known = ", ".join(kinds())
    if found:
        raise DataError(f"{root} looks like {' and '.join(found)}. Say which, as kind={found[0]}.")
    inside = sorted(path.name for path in root.iterdir())
    more = f" and {len(inside) - _SHOWN} more" if len(inside) > _SHOWN else ""
    raise DataError(
        f"{root} is not of a known layout; found in it: {', '.join(inside[:_SHOWN]) or 'nothing'}"
        f"{more}. Known kinds: {known}. For your own data, a folder per sequence with its frames "
        "(or one video) and groundtruth.txt, with x, y, width, height per line, works."
    )


def _reader(kind: str) -> _Reader:
    module = importlib.import_module(f"peft_vision.{FOLDER.replace('/', '.')}.{kind}")
    return _Reader(module.SPLITS, module.recognizes, module.read)
