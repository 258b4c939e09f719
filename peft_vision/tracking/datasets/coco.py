"""COCO 2017 detection (Lin et al., ECCV 2014): each annotated object is a sequence of one frame.

`annotations/instances_{train,val}2017.json` and the images in `train2017` and `val2017` (or in
`images/train2017`). Crowds are left out.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from peft_vision.errors import DataError
from peft_vision.tracking.boxes import Array
from peft_vision.tracking.datasets._files import FolderFrames, text_of, with_area
from peft_vision.tracking.sequence_set import LazySequences, SequenceSet
from peft_vision.tracking.sequences import TrackingSequence

NAME = "coco"
DIALECT = "otb"
SPLITS = ("train", "val")


class _Objects(NamedTuple):
    """All single objects: name, file name of the image, and a row x y w h, each."""

    folder: Path
    names: list[str]
    images: list[str]
    boxes: Array


def recognizes(root: Path) -> bool:
    """Whether there is a file of instances."""
    return any(_instances(root, split).is_file() for split in SPLITS)


def read(root: Path, split: str | None) -> SequenceSet:
    """Read the objects of a split; without a split: val, else train.

    Boxes are kept as one array; an image is opened when its object is asked for.

    Raises:
        DataError: the file of instances or the folder of images is missing, or it is not one.
    """
    chosen = split or next((s for s in ("val", "train") if _instances(root, s).is_file()), "val")
    file = _instances(root, chosen)
    folders = (root / f"{chosen}2017", root / "images" / f"{chosen}2017")
    folder = next((folder for folder in folders if folder.is_dir()), None)
    if folder is None:
        raise DataError(f"There is neither {folders[0]} nor {folders[1]} with the images.")
    objects = _objects(file, folder)
    if not objects.names:
        raise DataError(f"{file} lists no object that is not a crowd.")
    lazily = LazySequences(objects.names, partial(_opened, objects))
    return SequenceSet(NAME, chosen, lazily, DIALECT)


def _instances(root: Path, split: str) -> Path:
    return root / "annotations" / f"instances_{split}2017.json"


def _opened(objects: _Objects, index: int) -> TrackingSequence:
    row = objects.boxes[index : index + 1]
    frames = FolderFrames(objects.folder, objects.images[index : index + 1])
    return TrackingSequence(objects.names[index], frames, row, with_area(row))


def _objects(file: Path, folder: Path) -> _Objects:
    content = _json(file)
    try:
        files = {image["id"]: image["file_name"] for image in content["images"]}
        alone = [found for found in content["annotations"] if not found.get("iscrowd", 0)]
        names = [f"{found['image_id']}-{found['id']}" for found in alone]
        images = [files[found["image_id"]] for found in alone]
        boxes = np.array([found["bbox"] for found in alone], dtype=np.float64).reshape(-1, 4)
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{file} is not a file of COCO instances ({type(error).__name__}: {error}). It needs "
            "images with id and file_name, and annotations with id, image_id and bbox."
        ) from error
    return _Objects(folder, names, images, boxes)


def _json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(text_of(file))
    except json.JSONDecodeError as error:
        raise DataError(f"{file} is not JSON: {error}.") from error
    if not isinstance(content, dict):
        raise DataError(f"{file} is not a file of COCO instances: it holds no object.")
    return content
