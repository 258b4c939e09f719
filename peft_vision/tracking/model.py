"""Template and search image through one backbone, and a box out of every patch of the search image.

LoRAT (Lin et al., "Tracking Meets LoRA: Faster Training, Larger Model, Stronger Performance",
ECCV 2024, arXiv 2403.05231).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from peft_vision.backbones import view
from peft_vision.cost import unwrap
from peft_vision.data import preprocessing
from peft_vision.errors import BadSetting, UnsupportedSite
from peft_vision.history import History
from peft_vision.layers.positions import Grid
from peft_vision.layers.readout import Boxes, DenseReadout
from peft_vision.streams import Streams
from peft_vision.tracking.geometry import Geometry


class TrackingModel(nn.Module):
    """A model with two streams of images and a readout of boxes, as a module that is called.

    Its parameters are those of the model given, which is saved and loaded as ever.

    Attributes:
        model: the model given; `geometry` and `normalization` are read from its history.
        streams: its joint forward pass.
    """

    def __init__(self, model: nn.Module) -> None:
        """Prepare the model for calls.

        Args:
            model: with two streams, the first (template) with the kinds background and foreground,
                and a dense readout: wrapped, merged, compressed, or loaded.

        Raises:
            UnsupportedSite: it is not such a model.
        """
        super().__init__()
        self.model = model
        self.streams = Streams(model)
        self.readout = _readout(model)
        kinds = self.streams.kinds
        if len(kinds) != 2 or kinds[0] not in (1, 2):
            raise UnsupportedSite(
                f"The model has {len(kinds)} streams of {list(kinds)} kinds of tokens. A tracker "
                "has a template of the kinds background and foreground, and a search image: "
                "streams=(112, 224), kinds=(2, 1)."
            )

    @property
    def plain_model(self) -> nn.Module:
        """The backbone inside, with adapters in its layers."""
        return unwrap(self.model)

    @property
    def grids(self) -> tuple[Grid, Grid]:
        """Rows and columns of the patches of template and search image."""
        template, search = self.streams.grids
        return template, search

    @property
    def sides(self) -> tuple[int, int]:
        """Height (and width) of template and search image in pixels."""
        (template, _), (search, _) = self.grids
        return template * self.streams.patch[0], search * self.streams.patch[0]

    @property
    def geometry(self) -> Geometry:
        """What the model was trained to look at."""
        return Geometry.from_json(History.of(self.model).task)

    @property
    def normalization(self) -> tuple[list[float], list[float]]:
        """Mean and standard deviation of the channels of images in [0, 1]."""
        known: Mapping[str, Any] = History.of(self.model).preprocessing or preprocessing.default()
        return list(known["mean"]), list(known["std"])

    def forward(self, template: Tensor, search: Tensor, foreground: Tensor | None = None) -> Boxes:
        """Scores and boxes of all places of the search image.

        Args:
            template: B 3 h w, normalized. `search`: B 3 H W.
            foreground: 1 where a patch of the template shows the target and 0 elsewhere, whole
                numbers B on the template's grid; None: all of it is background.

        Raises:
            BadSetting: sizes do not fit the model.
        """
        if foreground is not None and self.streams.kinds[0] == 1:
            foreground = None
        _, tokens = self.streams([template, search], [foreground, None])
        found = self.readout(tokens, self.grids[1])
        if not isinstance(found, Boxes):
            raise BadSetting(f"The readout gives {type(found).__name__}; a tracker needs boxes.")
        return found


def _readout(model: nn.Module) -> DenseReadout:
    backbone = view(unwrap(model))
    found = [site.layer for site in backbone.readouts if isinstance(site.layer, DenseReadout)]
    if len(found) != 1:
        raise UnsupportedSite(
            f"{type(backbone.core).__name__} has no readout of boxes. Wrap it with one first: "
            'pv.wrap(model, "lorat", streams=(112, 224), kinds=(2, 1), readout="boxes").'
        )
    return found[0]
