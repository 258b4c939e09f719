"""The `data` and `task` sections of a recipe that trains a tracker."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from peft_vision.tracking.geometry import Geometry

_STRICT = ConfigDict(extra="forbid", strict=True, frozen=True)
Positive = Annotated[int, Field(ge=1)]


class PairAugmentation(BaseModel):
    """How much training pairs are changed.

    Attributes:
        scale_jitter: standard deviation of the logarithm of the search crop's scale, across and
            down each for itself.
        shift_jitter: the search crop is moved by up to this many sides of the target; a side is the
            mean of its width and height.
        flip: probability of a mirror image, for template and search image each for itself.
        color: brightness, contrast and saturation change by up to this share.
        three_augment: one of gray, solarized or blurred, the same for template and search image
            (3-Augment of DeiT III; Touvron et al., ECCV 2022).
    """

    model_config = _STRICT

    scale_jitter: Annotated[float, Field(ge=0, le=1)] = 0.25
    shift_jitter: Annotated[float, Field(ge=0, le=10)] = 3.0
    flip: Annotated[float, Field(ge=0, le=1)] = 0.5
    color: Annotated[float, Field(ge=0, lt=1)] = 0.4
    three_augment: bool = True


class SourceSettings(BaseModel):
    """Sequences on disk.

    Attributes:
        root: a folder, or demo/tracking.
        kind: its layout (`got10k`, `lasot`, ...); None: recognized.
        split: None: the one to train on (or to validate on), by the layout's own names.
        weight: how often pairs are drawn from it, relative to the other sources.
    """

    model_config = _STRICT

    root: Annotated[str, Field(min_length=1)]
    kind: str | None = None
    split: str | None = None
    weight: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0


def _source(given: Any) -> Any:
    return {"root": given} if isinstance(given, str) else given


def _sources(given: Any) -> Any:
    return [given] if isinstance(given, str | dict) else given


Source = Annotated[SourceSettings, BeforeValidator(_source)]
Sources = Annotated[list[Source], BeforeValidator(_sources)]


class PairSettings(BaseModel):
    """Pairs of frames, drawn from sequences.

    Attributes:
        sources: folders to train on; a single path will do, too.
        validation: folders to validate on; empty: `validation_fraction` of the sequences of each
            source, at least one, which then are not trained on.
        pairs, validation_pairs: drawn per epoch, and for each validation.
        gap: the most frames between template and search image, in either direction.
        augmentation: random changes of a pair.
    """

    model_config = _STRICT

    sources: Annotated[Sources, Field(min_length=1)]
    validation: Sources = []
    validation_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.05
    pairs: Positive = 131_072
    validation_pairs: Positive = 1024
    gap: Positive = 100
    augmentation: PairAugmentation = PairAugmentation()


class TrackingSettings(BaseModel):
    """Learn to track; see `Geometry` for what the areas and the window are."""

    model_config = _STRICT

    name: Literal["tracking"]
    template_area: Annotated[float, Field(ge=1, le=100)] = Geometry.template_area
    search_area: Annotated[float, Field(ge=1, le=100)] = Geometry.search_area
    window: Annotated[float, Field(ge=0, lt=1)] = Geometry.window

    @property
    def geometry(self) -> Geometry:
        """What is stored with the model."""
        return Geometry(self.template_area, self.search_area, self.window)
