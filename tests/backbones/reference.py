"""Token reorganization once more, slowly: full attention maps, one image at a time, own rotations.

Nothing here uses peft_vision: it reads the weights of timm's and transformers' blocks by name and
computes with plain matrix products, so that it can prove the fast path right or wrong.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def queries_keys_values(attention: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of one image's tokens (N C): three of H N D, normed, not rotated."""
    if getattr(attention, "qkv", None) is not None:
        bias = attention.qkv.bias
        if getattr(attention, "q_bias", None) is not None:
            bias = torch.cat([attention.q_bias, attention.k_bias, attention.v_bias])
        parts = F.linear(x, attention.qkv.weight, bias).chunk(3, dim=-1)
    else:
        parts = tuple(getattr(attention, n)(x) for n in ("q_proj", "k_proj", "v_proj"))
    q, k, v = (p.reshape(len(x), -1, attention.head_dim).transpose(0, 1) for p in parts)
    if getattr(attention, "q_norm", None) is not None:
        q, k = attention.q_norm(q), attention.k_norm(k)
    return q, k, v


def rotated(heads: Tensor, angles: tuple[Tensor, Tensor], prefix: int, halves: bool) -> Tensor:
    """Rotate each patch of H N D by its sines and cosines (patches x D), pair by pair."""
    sin, cos = angles
    width = heads.shape[-1]
    result = heads.clone()
    for dim in range(width):
        if halves:
            partner, sign = (dim + width // 2, -1) if dim < width // 2 else (dim - width // 2, 1)
        else:
            partner, sign = (dim + 1, -1) if dim % 2 == 0 else (dim - 1, 1)
        turned = (
            heads[:, prefix:, dim] * cos[:, dim] + sign * heads[:, prefix:, partner] * sin[:, dim]
        )
        result[:, prefix:, dim] = turned
    return result


def tables(rope: Any) -> tuple[Tensor, Tensor]:
    """Sines and cosines, patches x D, of timm's one table or of transformers' two."""
    if isinstance(rope, tuple):
        return rope[1], rope[0]
    sin, cos = rope.chunk(2, dim=-1)
    return sin, cos


def scaled(block: Any, branch: Tensor, which: int) -> Tensor:
    """What a branch passes through before it is added."""
    for name in (f"ls{which}", f"layer_scale{which}"):
        if getattr(block, name, None) is not None:
            branch = getattr(block, name)(branch)
    gamma = getattr(block, f"gamma_{which}", None)
    return branch if gamma is None else gamma * branch


def first_of(owner: Any, *names: str) -> Any:
    """The first of these attributes that there is."""
    return next(getattr(owner, name) for name in names if getattr(owner, name, None) is not None)


class Reference(nn.Module):
    """Stands in for a model's list of blocks."""

    def __init__(
        self, blocks: list[nn.Module], prefix: int, rates: dict[int, float], fuse: bool, rows: int
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.prefix, self.rates, self.fuse, self.rows = prefix, rates, fuse, rows
        self.places: list[list[int]] = []

    @torch.no_grad()
    def forward(self, x: Tensor, *_: Any, **given: Any) -> Tensor:
        rope = given.get("rope", given.get("position_embeddings"))
        return torch.stack([self.one(image, rope) for image in x])

    def one(self, x: Tensor, rope: Any) -> Tensor:
        """One image's tokens, N C."""
        places = list(range(len(x) - self.prefix))
        for index, block in enumerate(self.blocks):
            x, places = self.step(block, x, rope, places, self.rates.get(index))
        self.places.append(places)
        return x

    def step(
        self, block: Any, x: Tensor, rope: Any, places: list[int], rate: float | None
    ) -> tuple[Tensor, list[int]]:
        attention = first_of(block, "attn", "attention", "self_attn")
        normed = first_of(block, "layernorm_before", "layer_norm1", "norm1")(x)
        q, k, v = queries_keys_values(attention, normed)
        if rope is not None:
            sin, cos = (table[places] for table in tables(rope))
            halves = isinstance(rope, tuple) or attention.rotate_half
            q, k = (rotated(t, (sin, cos), self.prefix, halves) for t in (q, k))
        attention_map = (q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])).softmax(-1)
        y = (attention_map @ v).transpose(0, 1).reshape(len(x), -1)
        if getattr(attention, "norm", None) is not None:
            y = attention.norm(y)
        if getattr(attention, "gate", None) is not None:
            y = y * torch.sigmoid(attention.gate(normed))
        x = x + scaled(block, first_of(attention, "proj", "o_proj", "out_proj")(y), 1)
        if rate is not None:
            scores = attention_map[:, : self.rows, self.prefix :].mean((0, 1))
            x, places = self.reduce(x, scores, places, rate)
        normed = first_of(block, "layernorm_after", "layer_norm2", "norm2")(x)
        return x + scaled(block, block.mlp(normed), 2), places

    def reduce(
        self, x: Tensor, scores: Tensor, places: list[int], rate: float
    ) -> tuple[Tensor, list[int]]:
        ranked = sorted(range(len(scores)), key=lambda i: -float(scores[i]))
        count = math.ceil(rate * len(scores) - 1e-9)
        if count + self.fuse >= len(scores):
            return x, places
        stay, leave = sorted(ranked[:count]), ranked[count:]
        tokens = [x[i] for i in range(self.prefix)] + [x[self.prefix + i] for i in stay]
        places_left = [places[i] for i in stay]
        if self.fuse:
            tokens.append(sum(scores[i] * x[self.prefix + i] for i in leave))
            places_left.append(places[leave[0]])
        return torch.stack(tokens), places_left
