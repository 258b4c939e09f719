"""transformers' Swin Transformers: v1, v2, and those of Donut and MaskFormer."""

from __future__ import annotations

from torch import nn

from peft_vision.backbones import _stages
from peft_vision.backbones.sites import Backbone
from peft_vision.layers.attention_parts import AttentionParts
from peft_vision.layers.mlp import MlpParts

MODULES = (
    "transformers.models.swin.modeling_swin",
    "transformers.models.swinv2.modeling_swinv2",
    "transformers.models.donut.modeling_donut_swin",
    "transformers.models.maskformer.modeling_maskformer_swin",
)

TOKENS = (
    "its blocks attend within windows, which are squares of the whole image, and patches are "
    "merged by fours: tokens cannot leave"
)

FIRST = AttentionParts(
    qkv=("q_proj", "k_proj", "v_proj"),
    out="o_proj",
    heads=("num_attention_heads",),
    per_head=(("relative_position_bias.relative_position_bias_table", 1),),
)
SECOND = AttentionParts(
    qkv=("self.query", "self.key", "self.value"),
    out="output.dense",
    head_dim="self.attention_head_size",
    heads=("self.num_attention_heads",),
    width=("self.all_head_size",),
    per_head=(
        ("self.relative_position_bias_table", 1),
        ("self.logit_scale", 0),
        ("self.continuous_position_bias_mlp.2", 0),
    ),
)
MLP = MlpParts(up=("fc1",), down="fc2")
HALVES = MlpParts(up=("intermediate.dense",), down="output.dense")


def _attention(module: nn.Module) -> AttentionParts | None:
    from transformers.models.donut.modeling_donut_swin import DonutSwinAttention
    from transformers.models.maskformer.modeling_maskformer_swin import MaskFormerSwinAttention
    from transformers.models.swin.modeling_swin import SwinAttention
    from transformers.models.swinv2.modeling_swinv2 import Swinv2Attention

    known = dict.fromkeys((Swinv2Attention, DonutSwinAttention, MaskFormerSwinAttention), SECOND)
    return {**known, SwinAttention: FIRST}.get(type(module))


def _mlp(module: nn.Module) -> MlpParts | None:
    from transformers.models.swin.modeling_swin import SwinMLP

    return MLP if type(module) is SwinMLP else None


def _own_mlp(module: nn.Module) -> MlpParts | None:
    from transformers.models.donut.modeling_donut_swin import DonutSwinLayer
    from transformers.models.maskformer.modeling_maskformer_swin import MaskFormerSwinLayer
    from transformers.models.swinv2.modeling_swinv2 import Swinv2Layer

    known = (Swinv2Layer, DonutSwinLayer, MaskFormerSwinLayer)
    return HALVES if type(module) in known else None


WORDS = _stages.Words(attention=_attention, mlp=_mlp, own_mlp=_own_mlp, tokens=TOKENS)


def why_not(model: nn.Module) -> str:
    """What keeps the model from being understood; empty when nothing does."""
    return _stages.why_not(model, WORDS)


def view(model: nn.Module) -> Backbone:
    """See the model as sites."""
    return _stages.see(model, "hf_swin", WORDS)
