"""Decoupled position embedding (LoRAT; Lin et al., ECCV 2024, arXiv 2403.05231).

Where a patch stands is said by the pretrained table, frozen and shared by all image streams; of
which stream and kind it is, by a trainable row. `peft_vision.streams` runs several images through
one backbone in one sequence on top of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from peft_vision.backbones.positions import PositionsSite
from peft_vision.backbones.sites import Backbone, device_of
from peft_vision.errors import BadSetting, UnsupportedSite
from peft_vision.layers.ownership import trained_dtype
from peft_vision.layers.positions import Grid, TypeRows, resized
from peft_vision.method import Adapter, Evidence, check_range
from peft_vision.plan import Decisions

KEY = "positions"
FITS = ("slice", "resize")


@dataclass(frozen=True)
class DecoupledPosition(Adapter):
    """A frozen table of positions for all image streams, and a trained row per kind of token."""

    streams: tuple[int, ...] = ()
    """Side of each stream's square images in pixels, the largest last; empty: one stream of the
    model's own size."""

    kinds: tuple[int, ...] = ()
    """How many kinds of tokens each stream has, e.g. (2, 1) for a template's background and
    foreground and a search image; empty: one each."""

    fit: str = "slice"
    """What a smaller stream takes of the table: "slice" (its top left part) or "resize" (the
    pretrained table, resized to the stream's grid)."""

    std: float = 0.0
    """Standard deviation of the first values of the rows (truncated normal); 0 changes nothing at
    the start."""

    def __post_init__(self) -> None:
        _check_whole("streams", self.streams)
        _check_whole("kinds", self.kinds)
        check_range("std", self.std, 0.0, 10.0)
        if self.fit not in FITS:
            raise BadSetting(f"fit is {self.fit!r}; possible: {', '.join(FITS)}.")
        if self.streams and self.streams[-1] != max(self.streams):
            raise BadSetting(
                f"streams is {list(self.streams)}; the last one has to be the largest, because it "
                "takes the whole table."
            )
        if self.kinds and len(self.kinds) != max(1, len(self.streams)):
            raise BadSetting(
                f"kinds is {list(self.kinds)} and streams is {list(self.streams)}; each stream "
                "needs one number of kinds."
            )

    def decide(self, backbone: Backbone, strength: float, evidence: Evidence) -> Decisions:
        """The grids of patches, from which grid they come, and the kinds of tokens."""
        site = _site(backbone)
        if site.types is not None:
            raise UnsupportedSite(
                f"The positions of {type(backbone.core).__name__} are decoupled already. Merge "
                "first, or begin with the plain model."
            )
        if strength <= 0:
            return {}
        grids = [_grid(site, side) for side in self.streams] or [site.grid]
        return {
            KEY: {
                "grids": [list(grid) for grid in grids],
                "from": list(site.grid),
                "kinds": list(self.kinds or [1] * len(grids)),
                "fit": self.fit,
            }
        }

    def apply(self, backbone: Backbone, decisions: Decisions) -> None:
        """Resize the table to the largest grid, and put rows of zeros behind it."""
        if not decisions:
            return
        site, decision = _site(backbone), _decision(decisions)
        grids: list[Grid] = [(rows, columns) for rows, columns in decision["grids"]]
        pretrained = site.rows()
        types = TypeRows(
            getattr(site.owner, site.attribute),
            site.width,
            grids,
            decision["kinds"],
            prefix=site.prefix,
            channels_first=site.channels_first,
            device=device_of(backbone.model),
            dtype=trained_dtype(backbone.model),
        )
        if pretrained is not None and decision["fit"] == "resize":
            for stream, grid in enumerate(grids[:-1]):
                types.fit(stream, resized(pretrained, site.grid, grid))
        if grids[-1] != site.grid:
            site.resize(grids[-1])
        setattr(site.owner, site.attribute, types)

    def start(self, backbone: Backbone, decisions: Decisions) -> None:
        """Draw the rows, where they are not to begin as zeros."""
        types = _site(backbone).types
        if types is not None and self.std > 0:
            nn.init.trunc_normal_(types.type_embed, std=self.std)

    def trained(self, backbone: Backbone, decisions: Decisions) -> list[tuple[nn.Module, str]]:
        """The rows."""
        types = _site(backbone).types
        return [] if types is None else [(types, "type_embed")]

    def fold(self, backbone: Backbone, decisions: Decisions) -> bool:
        """Add a single row to the table, or to a bias; several rows cannot be told apart there."""
        site, decision = _site(backbone), _decision(decisions)
        types = site.types
        if types is None:
            return True
        if len(types.type_embed) > 1 or decision["from"] != decision["grids"][-1]:
            return False
        if not site.add(types.type_embed[0]):
            return False
        setattr(site.owner, site.attribute, types.inner)
        return True

    def foreign(self, backbone: Backbone, decisions: Decisions) -> str:
        """PEFT trains layers, and this is neither in one nor beside one."""
        return "its rows are added to the position table, where PEFT has no layer to put them"


def _check_whole(name: str, values: Sequence[Any]) -> None:
    if any(not isinstance(v, int) or isinstance(v, bool) or v < 1 for v in values):
        raise BadSetting(
            f"{name} is {list(values)!r}; it has to be a list of whole numbers of at least 1."
        )


def _site(backbone: Backbone) -> PositionsSite:
    backbone.require(KEY)
    if backbone.positions is None:
        raise AssertionError("require() admits backbones with positions only")
    return backbone.positions


def _grid(site: PositionsSite, side: int) -> Grid:
    rows, columns = site.patch
    if side % rows or side % columns:
        low = max(side // rows, 1) * rows
        raise BadSetting(
            f"streams holds {side}, which patches of {rows} x {columns} pixels do not fill. "
            f"Nearest: {low} and {low + rows}."
        )
    return side // rows, side // columns


def _decision(decisions: Decisions) -> dict[str, Any]:
    decision = decisions.get(KEY)
    if not isinstance(decision, dict):
        raise UnsupportedSite(f"{KEY}: not a decision on positions: {decision!r}.")
    return decision
