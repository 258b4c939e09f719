"""timm's MLP-Mixers: MLPs over patches and over features, gated ones and affine ones."""

from __future__ import annotations

from torch import nn

from peft_vision.backbones import _stages
from peft_vision.backbones.sites import Backbone

MODULES = ("timm.models.mlp_mixer",)

TOKENS = "its MLPs over patches have a weight for every place of the grid: tokens cannot leave"
WIDTH = "its blocks are not opened at their norms"


def _attention(module: nn.Module) -> None:
    return None


WORDS = _stages.Words(
    attention=_attention, tokens=TOKENS, width=WIDTH, heads="its patches are mixed by MLPs"
)


def why_not(model: nn.Module) -> str:
    """What keeps the model from being understood; empty when nothing does."""
    return _stages.why_not(model, WORDS)


def view(model: nn.Module) -> Backbone:
    """See the model as sites."""
    return _stages.see(model, "timm_mixer", WORDS)
