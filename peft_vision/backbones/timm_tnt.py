"""timm's TNT: a transformer of pixels within each patch of a transformer."""

from __future__ import annotations

from torch import nn

from peft_vision.backbones import _stages
from peft_vision.backbones.sites import Backbone
from peft_vision.layers.attention_parts import AttentionParts

MODULES = ("timm.models.tnt",)

TOKENS = (
    "each patch has a transformer of its own pixels beside it, which it is added to in every block"
)

ATTENTION = AttentionParts(
    qkv=("qk", "v"),
    pieces=(2, 1),
    out="proj",
    head_dim=None,
    heads=("num_heads",),
    width=("hidden_dim",),
)


def _attention(module: nn.Module) -> AttentionParts | None:
    from timm.models.tnt import Attention

    return ATTENTION if type(module) is Attention else None


WORDS = _stages.Words(attention=_attention, tokens=TOKENS)


def why_not(model: nn.Module) -> str:
    """What keeps the model from being understood; empty when nothing does."""
    return _stages.why_not(model, WORDS)


def view(model: nn.Module) -> Backbone:
    """See the model as sites."""
    return _stages.see(model, "timm_tnt", WORDS)
