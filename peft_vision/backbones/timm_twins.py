"""timm's Twins-SVT: attention within windows, and to an image made smaller, in turns."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from peft_vision.backbones import _stages
from peft_vision.backbones._attending import attend, project, split
from peft_vision.backbones.sites import Backbone
from peft_vision.backbones.timm_pvt import REDUCED
from peft_vision.layers.attention_parts import AttentionParts

MODULES = ("timm.models.twins",)

TOKENS = (
    "its attention lays the tokens out as an image, for windows and for convolutions: tokens "
    "cannot leave"
)


def grouped(attention: Any, x: Tensor, size: tuple[int, int]) -> Tensor:
    """Attention within windows of `ws` x `ws`, the image padded at its end: B N C."""
    batch, count, _ = x.shape
    (rows, columns), side = size, int(attention.ws)
    image = x.unflatten(1, (rows, columns))  # type: ignore[no-untyped-call]
    image = F.pad(image, (0, 0, 0, -columns % side, 0, -rows % side))
    down, across = image.shape[1] // side, image.shape[2] // side
    windows = image.reshape(batch, down, side, across, side, -1).transpose(2, 3).flatten(3, 4)
    q, k, v = split(attention.qkv(windows), 3, attention.num_heads)
    out = attend(attention, q, k, v).unflatten(3, (side, side))  # type: ignore[no-untyped-call]
    out = out.transpose(2, 3).reshape(batch, down * side, across * side, -1)
    return project(attention, out[:, :rows, :columns].reshape(batch, count, -1))


GROUPED = AttentionParts(
    qkv=("qkv",), out="proj", head_dim=None, heads=("num_heads",), forward=grouped
)


def _attention(module: nn.Module) -> AttentionParts | None:
    from timm.models.twins import GlobalSubSampleAttn, LocallyGroupedAttn

    known = {GlobalSubSampleAttn: REDUCED, LocallyGroupedAttn: GROUPED}
    return known.get(type(module))


WORDS = _stages.Words(attention=_attention, tokens=TOKENS)


def why_not(model: nn.Module) -> str:
    """What keeps the model from being understood; empty when nothing does."""
    return _stages.why_not(model, WORDS)


def view(model: nn.Module) -> Backbone:
    """See the model as sites."""
    return _stages.see(model, "timm_twins", WORDS)
