"""timm's CoaT: attention factored by features, on several scales at once."""

from __future__ import annotations

from torch import nn

from peft_vision.backbones import _stages
from peft_vision.backbones.sites import Backbone

MODULES = ("timm.models.coat",)

TOKENS = "its blocks convolve the image of all patches: tokens cannot leave"

SHARED = "its heads share convolutions, which tell where patches are, with those of other blocks"


def _attention(module: nn.Module) -> str | None:
    from timm.models.coat import FactorAttnConvRelPosEnc

    return SHARED if type(module) is FactorAttnConvRelPosEnc else None


WORDS = _stages.Words(attention=_attention, tokens=TOKENS)


def why_not(model: nn.Module) -> str:
    """What keeps the model from being understood; empty when nothing does."""
    return _stages.why_not(model, WORDS)


def view(model: nn.Module) -> Backbone:
    """See the model as sites."""
    return _stages.see(model, "timm_coat", WORDS)
