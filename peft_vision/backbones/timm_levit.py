"""timm's LeViT: linears with a norm of the batch behind them, values wider than keys."""

from __future__ import annotations

from torch import nn

from peft_vision.backbones import _stages
from peft_vision.backbones.sites import Backbone
from peft_vision.layers.attention_parts import AttentionParts
from peft_vision.layers.mlp import MlpParts

MODULES = ("timm.models.levit",)

TOKENS = (
    "its attention has a bias for every pair of places on the grid, and halves the grid on the way"
)

BIASES = (("attention_biases", 0),)
WITHIN = AttentionParts(
    qkv=("qkv.linear",),
    pieces=(1,),
    follow=(("qkv.bn", 1),),
    out="proj.ln.linear",
    head_dim=None,
    heads=("num_heads",),
    width=("key_attn_dim", "val_attn_dim"),
    per_head=BIASES,
    caches=("attention_bias_cache",),
)
BETWEEN = AttentionParts(
    qkv=("q.ln.linear", "kv.linear"),
    pieces=(1, 1),
    follow=(("q.ln.bn", 1), ("kv.bn", 1)),
    out="proj.ln.linear",
    head_dim=None,
    heads=("num_heads",),
    width=("key_attn_dim", "val_attn_dim"),
    per_head=BIASES,
    caches=("attention_bias_cache",),
)
MLP = MlpParts(up=("ln1.linear",), down="ln2.linear", between=("ln1.bn",))


def _attention(module: nn.Module) -> AttentionParts | None:
    from timm.models.levit import Attention, AttentionDownsample

    return {Attention: WITHIN, AttentionDownsample: BETWEEN}.get(type(module))


def _mlp(module: nn.Module) -> MlpParts | None:
    from timm.models.levit import LevitMlp

    return MLP if type(module) is LevitMlp else None


WORDS = _stages.Words(attention=_attention, mlp=_mlp, tokens=TOKENS)


def why_not(model: nn.Module) -> str:
    """What keeps the model from being understood; empty when nothing does."""
    return _stages.why_not(model, WORDS)


def view(model: nn.Module) -> Backbone:
    """See the model as sites."""
    return _stages.see(model, "timm_levit", WORDS)
