"""timm's FocalNet: what is around a patch modulates it, in the place of attention."""

from __future__ import annotations

from torch import nn

from peft_vision.backbones import _stages
from peft_vision.backbones.sites import Backbone

MODULES = ("timm.models.focalnet",)

TOKENS = "its blocks convolve the image of all patches: tokens cannot leave"


def _attention(module: nn.Module) -> None:
    return None


WORDS = _stages.Words(
    attention=_attention,
    tokens=TOKENS,
    heads="its patches are modulated, and there is no attention",
)


def why_not(model: nn.Module) -> str:
    """What keeps the model from being understood; empty when nothing does."""
    return _stages.why_not(model, WORDS)


def view(model: nn.Module) -> Backbone:
    """See the model as sites."""
    return _stages.see(model, "timm_focalnet", WORDS)
