"""timm's EfficientFormer, v1 and v2: convolutions first, attention late."""

from __future__ import annotations

from torch import nn

from peft_vision.backbones import _stages
from peft_vision.backbones.sites import Backbone
from peft_vision.layers.attention_parts import AttentionParts
from peft_vision.layers.mlp import MlpParts

MODULES = ("timm.models.efficientformer", "timm.models.efficientformer_v2")

TOKENS = "its attention has a bias for every pair of places on the grid, behind convolutions"

FIRST = AttentionParts(
    qkv=("qkv",),
    pieces=(1,),
    out="proj",
    head_dim=None,
    heads=("num_heads",),
    width=("key_attn_dim", "val_attn_dim"),
    per_head=(("attention_biases", 0),),
    caches=("attention_bias_cache",),
)
MIXED = "its heads are mixed by convolutions before and behind the softmax (talking heads)"
CONVOLVED = "its values pass a convolution beside the attention, and queries come of two paths"
CONV = MlpParts(up=("fc1",), down="fc2", between=("norm1",))
DEPTHWISE = MlpParts(up=("fc1.conv",), down="fc2.conv", between=("fc1.bn", "mid.conv", "mid.bn"))
POINTWISE = MlpParts(up=("fc1.conv",), down="fc2.conv", between=("fc1.bn",))


def _attention(module: nn.Module) -> AttentionParts | str | None:
    from timm.models.efficientformer import Attention
    from timm.models.efficientformer_v2 import Attention2d, Attention2dDownsample

    known: dict[type, AttentionParts | str] = {
        Attention: FIRST,
        Attention2d: MIXED,
        Attention2dDownsample: CONVOLVED,
    }
    return known.get(type(module))


def _mlp(module: nn.Module) -> MlpParts | None:
    from timm.models import efficientformer_v2
    from timm.models.efficientformer import ConvMlpWithNorm

    if type(module) is efficientformer_v2.ConvMlpWithNorm:
        return POINTWISE if isinstance(module.mid, nn.Identity) else DEPTHWISE
    return CONV if type(module) is ConvMlpWithNorm else _stages.timm_mlp(module)


WORDS = _stages.Words(attention=_attention, mlp=_mlp, tokens=TOKENS)


def why_not(model: nn.Module) -> str:
    """What keeps the model from being understood; empty when nothing does."""
    return _stages.why_not(model, WORDS)


def view(model: nn.Module) -> Backbone:
    """See the model as sites."""
    return _stages.see(model, "timm_efficientformer", WORDS)
