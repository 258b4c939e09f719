"""Only this folder knows timm and transformers: one file per architecture family.

A family file declares `MODULES` (where its classes are defined), `why_not(model) -> str` (what
keeps it from understanding a model of those classes; empty when nothing does) and `view(model)`.
"""

from __future__ import annotations

import importlib

from torch import nn

from peft_vision.backbones.joint import with_streams
from peft_vision.backbones.sites import Backbone
from peft_vision.lookup import stems

FALLBACK = "generic"
INFRASTRUCTURE = (
    "sites",
    "assembly",
    "channels",
    "joint",
    "positions",
    "queries",
    "width",
    FALLBACK,
)


def families() -> list[str]:
    """Names of the families that are understood in full."""
    return [stem for stem in stems("backbones") if stem not in INFRASTRUCTURE]


def view(model: nn.Module) -> Backbone:
    """See a plain model as sites.

    A model of a known family with a part that is not understood is seen as linears and
    convolutions; `missing` then says which part that is.

    Args:
        model: a timm or transformers backbone, or any module with linears or convolutions.

    Raises:
        UnsupportedBackbone: nothing in it can be acted on.
    """
    origins = {cls.__module__ for cls in type(model).__mro__}
    reason = ""
    for stem in families():
        family = importlib.import_module(f"{__name__}.{stem}")
        if not origins & set(family.MODULES):
            continue
        reason = family.why_not(model)
        if not reason:
            backbone: Backbone = with_streams(family.view(model))
            return backbone
    fallback = importlib.import_module(f"{__name__}.{FALLBACK}")
    seen: Backbone = fallback.view(model, reason)
    return seen
