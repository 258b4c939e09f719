"""Data sets of the `datasets` library: Hub ids, saved folders, parquet and arrow files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_vision.data.images import LabeledImages, Pictures
from peft_vision.errors import DataError

if TYPE_CHECKING:
    import datasets

TRAIN_NAMES = ("train", "training")
VALIDATION_NAMES = ("validation", "val", "valid", "test")
_TABLES = {".parquet": "parquet", ".arrow": "arrow"}


@dataclass(frozen=True)
class TablePictures(Pictures):
    """The image column of a table, left encoded until an image is asked for."""

    table: datasets.Dataset
    column: str

    def __len__(self) -> int:
        """Number of rows."""
        return int(self.table.num_rows)

    def encoded(self, index: int) -> bytes:
        """The bytes of a row's image, from the table or from the file it points to.

        Raises:
            ValueError: the row has no image.
        """
        cell = self.table[index][self.column]
        if cell is None or (cell["bytes"] is None and cell["path"] is None):
            raise ValueError("the row has no image")
        return (
            bytes(cell["bytes"]) if cell["bytes"] is not None else Path(cell["path"]).read_bytes()
        )

    def name(self, index: int) -> str:
        """The row number."""
        return f"row {index}"


def is_table_folder(path: Path) -> bool:
    """Whether a local path holds a data set of the library and not an image folder."""
    if path.is_file():
        return path.suffix in _TABLES
    marks = ("dataset_info.json", "dataset_dict.json", "state.json")
    return any((path / mark).exists() for mark in marks) or any(
        any(path.glob(f"*{suffix}")) or any(path.glob(f"data/*{suffix}")) for suffix in _TABLES
    )


def load_tables(name: str, config: str | None = None) -> dict[str, datasets.Dataset]:
    """Split name -> table, from a local path or a Hub id.

    Raises:
        DataError: nothing of that name can be read.
    """
    import datasets
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    path = Path(name)
    known = (
        OSError,
        ValueError,
        HfHubHTTPError,
        HFValidationError,
        datasets.exceptions.DatasetsError,
    )
    try:
        loaded = _load_local(path) if path.exists() else datasets.load_dataset(name, config)
    except known as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(
            f"The data set {name!r} cannot be loaded: {reason} "
            "A folder of images, a folder or file written by the datasets library, a Hub id "
            "(owner/name) or a name under demo/ works."
        ) from error
    return split_tables(loaded)


def split_tables(loaded: Any) -> dict[str, datasets.Dataset]:
    """Split name -> table of whatever the library returned."""
    import datasets

    if isinstance(loaded, datasets.Dataset):
        return {"train": loaded}
    return {str(name): table for name, table in loaded.items()}


def _load_local(path: Path) -> Any:
    import datasets

    if any((path / mark).exists() for mark in ("dataset_dict.json", "state.json")):
        return datasets.load_from_disk(str(path))
    if path.is_file():
        return datasets.load_dataset(_TABLES[path.suffix], data_files=str(path))
    return datasets.load_dataset(str(path))


def read_table(
    table: datasets.Dataset,
    origin: str,
    image_column: str | None = None,
    label_column: str | None = None,
) -> LabeledImages:
    """The images and labels of a table.

    Args:
        table: its columns are found by type where their names are not given.
        origin: what to call it in messages.
        image_column: its name.
        label_column: its name.

    Raises:
        DataError: a column is missing or of the wrong kind, or the table is empty.
    """
    import datasets

    if table.num_rows == 0:
        raise DataError(f"{origin} has no rows. A table with at least two classes works.")
    features = table.features
    image = _column(features, image_column, origin, "image", (datasets.Image,), ("image", "img"))
    label = _column(
        features,
        label_column,
        origin,
        "label",
        (datasets.ClassLabel,),
        ("label", "labels", "fine_label"),
    )
    names, targets = _labels(table, label, origin)
    pictures = TablePictures(
        table.select_columns([image]).cast_column(image, datasets.Image(decode=False)), image
    )
    return LabeledImages(
        pictures, tuple(range(table.num_rows)), tuple(targets), tuple(names), origin
    )


def _column(
    features: Mapping[str, Any],
    asked: str | None,
    origin: str,
    kind: str,
    types: tuple[type, ...],
    usual: tuple[str, ...],
) -> str:
    if asked is not None:
        if asked not in features:
            raise DataError(f"{origin} has no column {asked!r}. It has {', '.join(features)}.")
        return asked
    fitting = [name for name, feature in features.items() if isinstance(feature, types)]
    if len(fitting) == 1:
        return fitting[0]
    for name in usual:
        if name in (fitting or features):
            return name
    raise DataError(
        f"{origin} has no column that is clearly the {kind}: there are {', '.join(features)}. "
        f"Name one with data.{kind}_column."
    )


def _labels(table: datasets.Dataset, column: str, origin: str) -> tuple[list[str], list[int]]:
    import datasets

    feature, values = table.features[column], table[column][:]
    if any(value is None or value == -1 for value in values):
        raise DataError(
            f"{origin}: column {column!r} has rows without a label. A split with labels works."
        )
    if isinstance(feature, datasets.ClassLabel):
        return list(feature.names), [int(value) for value in values]
    if not isinstance(values[0], (str, int)):
        raise DataError(
            f"{origin}: column {column!r} holds {type(values[0]).__name__} values; a class name or "
            "number per row works."
        )
    found = sorted(set(values))
    place = {value: number for number, value in enumerate(found)}
    return [str(value) for value in found], [place[value] for value in values]
