"""Where the data are and how they are augmented: the `data` section of a recipe."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[int, Field(ge=1)]


class RandAugment(BaseModel):
    """Random photometric and geometric operations (Cubuk et al., 2020).

    Attributes:
        operations: how many are applied to an image.
        magnitude: their strength, 0 to 30.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    operations: Annotated[int, Field(ge=1, le=5)] = 2
    magnitude: Annotated[int, Field(ge=0, le=30)] = 9


class Augmentation(BaseModel):
    """Random changes of a training image.

    Attributes:
        flip: probability of a horizontal flip.
        flip_vertical: probability of a vertical flip.
        crop: the smallest area of a random crop, as a fraction of the image; 1 keeps the
            checkpoint's own resize and center crop.
        rand_augment: None for none.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    flip: Fraction = 0.5
    flip_vertical: Fraction = 0.0
    crop: Annotated[float, Field(gt=0, le=1)] = 0.5
    rand_augment: RandAugment | None = None


class DataSettings(BaseModel):
    """The data of a run.

    Attributes:
        train: an image folder, a folder or file of the `datasets` library, a Hub id, or
            demo/<name>.
        validation: another source of the same kinds; None: the validation split that `train` has,
            or else `validation_fraction` of it, drawn class by class.
        config: which configuration of a Hub data set.
        train_split, validation_split: names of splits, found by their usual names where None.
        image_column, label_column: of a table, found by type where None.
        image_size: pixels; None: the model's own.
        max_train, max_validation: use at most so many images, drawn by the seed.
        on_bad_image: files that cannot be read are left out and counted, or refused.
        check: `full` decodes every image before training; `none` only when it is used.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    train: Annotated[str, Field(min_length=1)]
    validation: str | None = None
    config: str | None = None
    train_split: str | None = None
    validation_split: str | None = None
    image_column: str | None = None
    label_column: str | None = None
    validation_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.2
    image_size: Positive | None = None
    max_train: Positive | None = None
    max_validation: Positive | None = None
    on_bad_image: Literal["refuse", "skip"] = "skip"
    check: Literal["full", "none"] = "full"
    augmentation: Augmentation = Augmentation()
