"""timm's BEiT and BEiT v2: a bias for every pair of patches, in every block."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from peft_vision.backbones import _stages
from peft_vision.backbones._attending import attend, biased, project, split
from peft_vision.backbones.sites import Backbone
from peft_vision.layers.attention_parts import AttentionParts

MODULES = ("timm.models.beit",)

TOKENS = (
    "its attention has a bias for every pair of places on the grid, which tokens would take along"
)
WIDTH = "its attention holds biases and scales that are laid out for its whole width"
SHARED = "all blocks share one table of biases with an entry for each head"


def relative(attention: Any, x: Tensor, shared_rel_pos_bias: Tensor | None = None) -> Tensor:
    """Attention with a bias for every pair of tokens, B N C."""
    q, k, v = split(biased(attention, x), 3, attention.num_heads)
    bias = shared_rel_pos_bias
    if attention.relative_position_bias_table is not None:
        own = attention._get_rel_pos_bias()  # noqa: SLF001
        bias = own if bias is None else own + bias
    return project(attention, attend(attention, q, k, v, bias))


RELATIVE = AttentionParts(
    qkv=("qkv",),
    out="proj",
    head_dim=None,
    heads=("num_heads",),
    biases=("q_bias", "k_bias", "v_bias"),
    per_head=(("relative_position_bias_table", 1),),
    forward=relative,
)


def _attention(module: nn.Module) -> AttentionParts | None:
    from timm.models.beit import Attention

    return RELATIVE if type(module) is Attention else None


def _shared(module: nn.Module) -> AttentionParts | str | None:
    return SHARED if _attention(module) is not None else None


def _words(model: Any) -> _stages.Words:
    attention = _attention if model.rel_pos_bias is None else _shared
    return _stages.Words(attention=attention, tokens=TOKENS, width=WIDTH)


def why_not(model: nn.Module) -> str:
    """What keeps the model from being understood; empty when nothing does."""
    return _stages.why_not(model, _words(model))


def view(model: nn.Module) -> Backbone:
    """See the model as sites."""
    return _stages.see(model, "timm_beit", _words(model))
