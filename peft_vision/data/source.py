"""From the name of a data source to labeled images, split into training and validation."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from peft_vision.data import demo, hub, image_folder
from peft_vision.data.images import (
    LabeledImages,
    limited,
    skipped_message,
    stratified,
    without_bad,
)
from peft_vision.errors import DataError
from peft_vision.lookup import unknown

if TYPE_CHECKING:
    import datasets

    from peft_vision.data.settings import DataSettings

DEMO = "demo/"


@dataclass(frozen=True)
class Split:
    """Training and validation images with the same class names, and what to say about them."""

    train: LabeledImages
    validation: LabeledImages
    notes: tuple[str, ...] = ()

    @property
    def names(self) -> list[str]:
        """Class names in the order of the model's outputs."""
        return list(self.train.names)


def open_split(settings: DataSettings, seed: int) -> Split:
    """The images of a run.

    Raises:
        DataError: the source is missing, empty, unreadable or not labeled, has one class only, or
            training and validation do not have the same classes.
    """
    found = _splits_of(settings.train, settings)
    train = _pick(found, settings.train_split, ("train", "training", "all"), settings.train)
    notes: list[str] = []
    if settings.validation is not None:
        other = _splits_of(settings.validation, settings)
        usual = (*hub.VALIDATION_NAMES, "all", "train")
        validation = _pick(other, settings.validation_split, usual, settings.validation)
    elif settings.validation_split is not None or any(n in found for n in hub.VALIDATION_NAMES):
        validation = _pick(found, settings.validation_split, hub.VALIDATION_NAMES, settings.train)
    else:
        train = without_bad(train, settings.on_bad_image, settings.check)
        _refuse_one_class(train)
        train, validation = stratified(train, settings.validation_fraction, seed)
        notes.append(
            f"{train.origin} has no validation split: {len(validation)} of "
            f"{len(train) + len(validation)} images were set aside, drawn class by class."
        )
    train = without_bad(train, settings.on_bad_image, settings.check)
    validation = without_bad(validation, settings.on_bad_image, settings.check)
    _refuse_one_class(train)
    validation = _matching(train, validation)
    said = dict.fromkeys(skipped_message(part) for part in (train, validation))
    notes += [note for note in said if note is not None]
    return Split(
        limited(train, settings.max_train, seed),
        limited(validation, settings.max_validation, seed),
        tuple(notes),
    )


def open_for_evaluation(settings: DataSettings) -> LabeledImages:
    """All images to evaluate on: the validation split where there is one, else everything.

    Raises:
        DataError: as `open_split`; a single class is fine here.
    """
    found = _splits_of(settings.train, settings, one_class=True)
    usual = (*hub.VALIDATION_NAMES, "all", "train", "training")
    data = _pick(found, settings.validation_split, usual, settings.train)
    return without_bad(data, settings.on_bad_image, settings.check)


def open_for_calibration(name: str, count: int) -> LabeledImages:
    """Images to look at without their labels: of the training split where there is one, else all.

    Args:
        name: a folder of images, arranged in any way, or another source as in a recipe.
        count: at most so many, drawn by a fixed seed; unreadable ones are left out.

    Raises:
        DataError: there are none that can be read.
    """
    path = Path(name).expanduser()
    if path.is_dir() and not hub.is_table_folder(path):
        folders = image_folder.splits(path)
        data = image_folder.read_unlabeled(folders.get("train", path))
    else:
        from peft_vision.data.settings import DataSettings  # loads pydantic

        found = _splits_of(name, DataSettings(train=name), one_class=True)
        data = _pick(found, None, (*hub.TRAIN_NAMES, "all", *hub.VALIDATION_NAMES), name)
    return without_bad(limited(data, count, seed=0), "skip", "full")


def _splits_of(
    name: str, settings: DataSettings, *, one_class: bool = False
) -> dict[str, LabeledImages]:
    if name.startswith(DEMO):
        return _tables(_demo(name.removeprefix(DEMO)), name, settings)
    path = Path(name).expanduser()
    looks_local = name.startswith(("/", ".", "~")) or name.count("/") != 1
    if path.exists() and (path.is_file() or hub.is_table_folder(path)):
        return _tables(hub.load_tables(str(path), settings.config), name, settings)
    if path.exists() or looks_local:
        folders = image_folder.splits(path)
        return {
            split: image_folder.read_folder(folder, root=path, one_class=one_class)
            for split, folder in folders.items()
        }
    return _tables(hub.load_tables(name, settings.config), name, settings)


def _tables(
    tables: dict[str, datasets.Dataset], name: str, settings: DataSettings
) -> dict[str, LabeledImages]:
    wanted = {settings.train_split, settings.validation_split, *hub.TRAIN_NAMES}
    wanted |= set(hub.VALIDATION_NAMES)
    used = {split: table for split, table in tables.items() if split in wanted} or tables
    return {
        split: hub.read_table(
            table, f"{name} [{split}]", settings.image_column, settings.label_column
        )
        for split, table in used.items()
    }


def _demo(name: str) -> dict[str, datasets.Dataset]:
    if name not in demo.names():
        raise unknown(
            "demo data set", f"{DEMO}{name}", [f"{DEMO}{known}" for known in demo.names()]
        )
    return demo.load(name)


def _pick(
    found: dict[str, LabeledImages], asked: str | None, usual: tuple[str, ...], name: str
) -> LabeledImages:
    if asked is not None:
        if asked not in found:
            raise DataError(f"{name} has no split {asked!r}. It has {', '.join(found)}.")
        return found[asked]
    for split in usual:
        if split in found:
            return found[split]
    raise DataError(
        f"{name} has the splits {', '.join(found)}, none of them called {', '.join(usual[:2])}. "
        "Name the ones to use with data.train_split and data.validation_split."
    )


def _refuse_one_class(train: LabeledImages) -> None:
    used = {train.names[target] for target in train.targets}
    if len(used) < 2:
        raise DataError(
            f"{train.origin} has images of one class only ({', '.join(used)}). "
            "Training a classifier needs images of at least two classes."
        )


def _matching(train: LabeledImages, validation: LabeledImages) -> LabeledImages:
    extra = [name for name in validation.names if name not in train.names]
    if extra:
        raise DataError(
            f"{validation.origin} has classes that {train.origin} lacks: {', '.join(extra[:5])}. "
            f"The training classes are {', '.join(train.names[:10])}. Class names must match."
        )
    return validation.relabeled(train.names)
