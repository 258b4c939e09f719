"""Tracking one object through a video: the model, its training, inference and evaluation.

Everything public is at hand as an attribute and is imported when it is asked for:
``peft_vision.tracking.Tracker``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peft_vision.tracking.evaluation import evaluate as evaluate
    from peft_vision.tracking.frames import open_frames as open_frames
    from peft_vision.tracking.geometry import Geometry as Geometry
    from peft_vision.tracking.model import TrackingModel as TrackingModel
    from peft_vision.tracking.reading import read_sequences as read_sequences
    from peft_vision.tracking.submission import figures_of as figures_of
    from peft_vision.tracking.tracker import Tracker as Tracker

_PUBLIC = {
    "Geometry": "geometry",
    "Tracker": "tracker",
    "TrackingModel": "model",
    "evaluate": "evaluation",
    "figures_of": "submission",
    "open_frames": "frames",
    "read_sequences": "reading",
}

__all__ = sorted(_PUBLIC)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'peft_vision.tracking' has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_PUBLIC[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
