"""timm's PVT v2: keys and values of an image made smaller, MLPs with a convolution inside."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from peft_vision.backbones import _stages
from peft_vision.backbones._attending import attend, project, split
from peft_vision.backbones.sites import Backbone
from peft_vision.layers.attention_parts import AttentionParts
from peft_vision.layers.mlp import MlpParts

MODULES = ("timm.models.pvt_v2",)

TOKENS = (
    "its attention and its MLPs lay the tokens out as an image, for convolutions: tokens cannot "
    "leave"
)


def reduced(attention: Any, x: Tensor, size: tuple[int, int]) -> Tensor:
    """Queries of all patches, keys and values of an image made smaller: B N C.

    Args:
        size: rows and columns of the patches.
    """
    (q,) = split(attention.q(x), 1, attention.num_heads)
    if attention.sr is not None:
        image = x.transpose(1, 2).unflatten(-1, tuple(size))  # type: ignore[no-untyped-call]
        pool = getattr(attention, "pool", None)
        x = attention.sr(image if pool is None else pool(image)).flatten(2).transpose(1, 2)
        x = attention.norm(x)
        x = x if pool is None else attention.act(x)
    k, v = split(attention.kv(x), 2, attention.num_heads)
    return project(attention, attend(attention, q, k, v))


REDUCED = AttentionParts(
    qkv=("q", "kv"),
    pieces=(1, 2),
    out="proj",
    head_dim=None,
    heads=("num_heads",),
    forward=reduced,
)
DEPTHWISE = MlpParts(up=("fc1",), down="fc2", between=("dwconv",))


def _attention(module: nn.Module) -> AttentionParts | None:
    from timm.models.pvt_v2 import Attention

    return REDUCED if type(module) is Attention else None


def _mlp(module: nn.Module) -> MlpParts | None:
    from timm.models.pvt_v2 import MlpWithDepthwiseConv

    return DEPTHWISE if type(module) is MlpWithDepthwiseConv else _stages.timm_mlp(module)


WORDS = _stages.Words(attention=_attention, mlp=_mlp, tokens=TOKENS)


def why_not(model: nn.Module) -> str:
    """What keeps the model from being understood; empty when nothing does."""
    return _stages.why_not(model, WORDS)


def view(model: nn.Module) -> Backbone:
    """See the model as sites."""
    return _stages.see(model, "timm_pvt", WORDS)
