"""transformers' LeViT: linears with a norm of the batch behind them, values wider than keys."""

from __future__ import annotations

from torch import nn

from peft_vision.backbones import _stages
from peft_vision.backbones.sites import Backbone
from peft_vision.layers.attention_parts import AttentionParts
from peft_vision.layers.mlp import MlpParts

MODULES = ("transformers.models.levit.modeling_levit",)

TOKENS = (
    "its attention has a bias for every pair of places on the grid, and halves the grid on the way"
)

WITHIN = AttentionParts(
    qkv=("queries_keys_values.linear",),
    pieces=(1,),
    follow=(("queries_keys_values.batch_norm", 1),),
    out="projection.linear",
    head_dim=None,
    heads=("num_attention_heads",),
    width=("out_dim_keys_values", "out_dim_projection"),
    per_head=(("attention_biases", 0),),
    caches=("attention_bias_cache",),
)
BETWEEN = AttentionParts(
    qkv=("queries.linear", "keys_values.linear"),
    pieces=(1, 1),
    follow=(("queries.batch_norm", 1), ("keys_values.batch_norm", 1)),
    out="projection.linear",
    head_dim=None,
    heads=("num_attention_heads",),
    width=("out_dim_keys_values", "out_dim_projection"),
    per_head=(("attention_biases", 0),),
    caches=("attention_bias_cache",),
)
MLP = MlpParts(
    up=("linear_up.linear",), down="linear_down.linear", between=("linear_up.batch_norm",)
)


def _attention(module: nn.Module) -> AttentionParts | None:
    from transformers.models.levit.modeling_levit import LevitAttention, LevitAttentionSubsample

    return {LevitAttention: WITHIN, LevitAttentionSubsample: BETWEEN}.get(type(module))


def _mlp(module: nn.Module) -> MlpParts | None:
    from transformers.models.levit.modeling_levit import LevitMLPLayer

    return MLP if type(module) is LevitMLPLayer else None


WORDS = _stages.Words(attention=_attention, mlp=_mlp, tokens=TOKENS)


def why_not(model: nn.Module) -> str:
    """What keeps the model from being understood; empty when nothing does."""
    return _stages.why_not(model, WORDS)


def view(model: nn.Module) -> Backbone:
    """See the model as sites."""
    return _stages.see(model, "hf_levit", WORDS)
