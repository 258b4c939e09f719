"""transformers' PVT, v1 and v2, SegFormer and GLPN: keys and values of an image made smaller."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from peft_vision.backbones import _stages
from peft_vision.backbones._attending import joined, split
from peft_vision.backbones.sites import Backbone
from peft_vision.layers.attention_parts import AttentionParts
from peft_vision.layers.mlp import MlpParts

MODULES = (
    "transformers.models.pvt_v2.modeling_pvt_v2",
    "transformers.models.pvt.modeling_pvt",
    "transformers.models.segformer.modeling_segformer",
    "transformers.models.glpn.modeling_glpn",
)

TOKENS = (
    "its attention and its MLPs lay the tokens out as an image, for convolutions: tokens cannot "
    "leave"
)


def reduced(
    attention: Any,
    hidden_states: Tensor,
    height: int,
    width: int,
    output_attentions: bool = False,
) -> tuple[Tensor, ...]:
    """Queries of all patches, keys and values of an image made smaller: B N C, and the weights."""
    heads, x = attention.num_attention_heads, hidden_states
    (q,) = split(attention.query(x), 1, heads)
    if attention.linear_attention or attention.spatial_reduction_ratio > 1:
        image = x.transpose(1, 2).unflatten(-1, (height, width))  # type: ignore[no-untyped-call]
        image = attention.pool(image) if attention.linear_attention else image
        x = attention.spatial_reduction(image).flatten(2).transpose(1, 2)
        x = attention.layer_norm(x)
        x = attention.act(x) if attention.linear_attention else x
    (k,), (v,) = (split(layer(x), 1, heads) for layer in (attention.key, attention.value))
    logits = q @ k.transpose(-2, -1) * attention.attention_head_size**-0.5
    weights = attention.attn_drop(logits.softmax(dim=-1))
    y = attention.proj_drop(attention.proj(joined(weights @ v)))
    return (y, weights) if output_attentions else (y,)


REDUCED = AttentionParts(
    qkv=("query", "key", "value"),
    out="proj",
    head_dim="attention_head_size",
    heads=("num_attention_heads",),
    width=("all_head_size",),
    forward=reduced,
)
SEGFORMER = AttentionParts(
    qkv=("q_proj", "k_proj", "v_proj"), out="o_proj", heads=("num_attention_heads",)
)
HALVES = AttentionParts(
    qkv=("self.query", "self.key", "self.value"),
    out="output.dense",
    head_dim="self.attention_head_size",
    heads=("self.num_attention_heads",),
    width=("self.all_head_size",),
)
DENSE = MlpParts(up=("dense1",), down="dense2")
MLP = MlpParts(up=("dense1",), down="dense2", between=("dwconv.dwconv",))
MIX = MlpParts(up=("fc1",), down="fc2", between=("dwconv.dwconv",))


def _attention(module: nn.Module) -> AttentionParts | None:
    from transformers.models.glpn.modeling_glpn import GLPNAttention
    from transformers.models.pvt.modeling_pvt import PvtAttention
    from transformers.models.pvt_v2.modeling_pvt_v2 import PvtV2SelfAttention
    from transformers.models.segformer.modeling_segformer import SegformerAttention

    known = {PvtV2SelfAttention: REDUCED, SegformerAttention: SEGFORMER}
    return {**known, GLPNAttention: HALVES, PvtAttention: HALVES}.get(type(module))


def _mlp(module: nn.Module) -> MlpParts | None:
    from transformers.models.glpn.modeling_glpn import GLPNMixFFN
    from transformers.models.pvt.modeling_pvt import PvtFFN
    from transformers.models.pvt_v2.modeling_pvt_v2 import PvtV2ConvFeedForwardNetwork
    from transformers.models.segformer.modeling_segformer import SegformerMixMLP

    known = {PvtV2ConvFeedForwardNetwork: MLP, SegformerMixMLP: MIX}
    return {**known, GLPNMixFFN: MLP, PvtFFN: DENSE}.get(type(module))


WORDS = _stages.Words(attention=_attention, mlp=_mlp, tokens=TOKENS)


def why_not(model: nn.Module) -> str:
    """What keeps the model from being understood; empty when nothing does."""
    return _stages.why_not(model, WORDS)


def view(model: nn.Module) -> Backbone:
    """See the model as sites."""
    return _stages.see(model, "hf_pvt", WORDS)
