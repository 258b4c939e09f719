"""A model made ready to track: opened, checked, its adapters folded in."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from peft_vision.backbones import view
from peft_vision.errors import BadSetting, UnsupportedSite
from peft_vision.history import History
from peft_vision.layers.ownership import plain_of
from peft_vision.loading import load
from peft_vision.merging import merge
from peft_vision.tracking.model import TrackingModel
from peft_vision.wrapping import is_adapted


def ready(model: str | Path | nn.Module, *, merged: bool) -> TrackingModel:
    """A tracking model from what a user calls one.

    Args:
        merged: fold adapters into a copy; those of a base in fewer bits stay.

    Raises:
        BadSetting: it does not track, or its adapters cannot be merged.
        ArtifactError: the folder cannot be loaded.
    """
    loaded: nn.Module = load(model) if isinstance(model, str | Path) else model
    given = loaded.model if isinstance(loaded, TrackingModel) else loaded
    found = _checked(given, model if isinstance(model, str | Path) else type(given).__name__)
    if not merged or not is_adapted(given) or History.of(given).quantized:
        return found
    try:
        return TrackingModel(merge(given))
    except UnsupportedSite as error:
        raise BadSetting(f"{error} Possible: merged=False (--unmerged).") from error


def device_named(name: str | torch.device | None) -> torch.device:
    """A device by name; None: a GPU where there is one.

    Raises:
        BadSetting: there is no such device.
    """
    try:
        chosen = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise BadSetting(f"There is no device {name!r}. Possible: cpu, cuda:1, mps.") from error
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise BadSetting(
            f"The device is {name}; torch sees {torch.cuda.device_count()} GPUs. Possible: cpu."
        )
    return chosen


def input_dtype(model: TrackingModel) -> torch.dtype:
    """Of the layer that takes the images; the others cast what they are given."""
    first = view(model.plain_model).convs[:1]
    weights = [plain_of(site.layer).weight for site in first] or list(model.parameters())
    return next(w.dtype for w in weights if isinstance(w, Tensor) and w.is_floating_point())


def _checked(model: nn.Module, named: object) -> TrackingModel:
    try:
        return TrackingModel(model)
    except UnsupportedSite as error:
        found = str(error).partition(". ")[0]
        raise BadSetting(
            f"{named} is not a tracker: {found}. Needed: a model of template and search image with "
            'a readout of boxes, as pv.wrap(model, "lorat", streams=(112, 224), kinds=(2, 1), '
            'readout="boxes") makes one and fine-tuning trains it.'
        ) from error
