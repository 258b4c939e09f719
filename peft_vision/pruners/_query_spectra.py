"""How much of attention's logits each feature of queries and keys carries, and the best few.

Logits are products q . k. A constant per query changes no softmax, so keys count around their mean
in the image. With second moments Q of queries and K of such keys, the map of rank n whose logits
q . (A^T B) k come nearest to q . k on average is read off the singular values of Q^1/2 K^1/2: its
square error is the sum of the squares of those left out. A and B go into the weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peft_vision.backbones.queries import QueriesSite
from peft_vision.calibration import Walk
from peft_vision.layers.attention import project
from peft_vision.layers.named_parts import part_of
from peft_vision.layers.split_linear import SplitLinear
from peft_vision.layers.surgery import output_tensors, weight_of


@dataclass(frozen=True)
class QueryMoments:
    """Second moments of queries and keys of one attention module, H D D each, in float64."""

    q: Tensor
    k: Tensor

    @property
    def spectrum(self) -> Tensor:
        """Mean square of the logits along each direction, H D, falling; as if scaled by one."""
        middle = _root(self.q) @ _root(self.k)
        values: Tensor = torch.linalg.svdvals(middle)
        return values.square()

    @property
    def carried(self) -> Tensor:
        """Mean square of what each feature alone adds to the logits, H D."""
        return self.q.diagonal(dim1=1, dim2=2) * self.k.diagonal(dim1=1, dim2=2)

    def best(self, rank: int) -> tuple[Tensor, Tensor]:
        """A and B, H n D: their products of queries and keys come nearest to those of the whole."""
        left, right = _root(self.q), _root(self.k)
        u, s, v = torch.linalg.svd(left @ right)
        scale = s[:, :rank, None].sqrt()
        a = scale * (u.mT[:, :rank] @ _inverse(left))
        b = scale * (v[:, :rank] @ _inverse(right))
        return a, b


@torch.no_grad()
def moments_of(walk: Walk, site: QueriesSite) -> QueryMoments:
    """Of the images where the walk is: before the block of this site."""
    trunk = walk.trunk
    rows = trunk.rows_of(walk.index)
    count, width = site.count, site.width
    q_sum, k_sum = (torch.zeros(count, width, width, dtype=torch.float64) for _ in range(2))
    queries = keys = 0
    for stream in walk.streams:
        normed = getattr(walk.block, trunk.parts.norm1)(stream.x)
        q, k, _ = project(site.attention, site.parts, normed)
        q = q[:, :, :rows]
        if site.mates is None:  # where keys are rotated, their mean is, too, to each place its own
            k = k - k.mean(2, keepdim=True)
        q_sum += _squares(q)
        k_sum += _squares(k)
        queries += q.shape[0] * q.shape[2]
        keys += k.shape[0] * k.shape[2]
    return QueryMoments(q_sum / queries, k_sum / keys)


def _squares(heads: Tensor) -> Tensor:
    """Sum of outer products of B H N D: H D D."""
    wide = heads.to(torch.promote_types(heads.dtype, torch.float32))
    return torch.einsum("bhnd,bhne->hde", wide, wide).double().cpu()


def _root(square: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(square)
    root: Tensor = vectors @ (values.clamp_min(0).sqrt()[..., None] * vectors.mT)
    return root


def _inverse(root: Tensor) -> Tensor:
    """Where there is nothing to invert, nothing."""
    inverse: Tensor = torch.linalg.pinv(root, rtol=1e-7, hermitian=True)
    return inverse


Held = tuple[Tensor, int]
"""What has a row for each feature, and where the first one is."""


@dataclass(frozen=True)
class Rows:
    """Everything that makes queries, and keys, linearly: tensors of H D x anything, in float64."""

    q: list[Tensor]
    k: list[Tensor]

    def turned(self, a: Tensor, b: Tensor) -> Rows:
        """The same through A and B (H n D)."""
        return Rows([_through(a, t) for t in self.q], [_through(b, t) for t in self.k])


def _through(side: Tensor, rows: Tensor) -> Tensor:
    by_head = rows.reshape(len(side), side.shape[2], -1)
    return (side @ by_head).reshape(-1, *rows.shape[1:])


def rows_of(site: QueriesSite) -> Rows:
    """What there is now.

    Raises:
        UnsupportedSite: a layer has no rule.
    """
    size = site.count * site.width
    q, k = (
        [tensor.detach()[start : start + size].double().cpu() for tensor, start in held]
        for held in _held(site)
    )
    return Rows(q, k)


@torch.no_grad()
def set_rows(site: QueriesSite, rows: Rows) -> None:
    """Put rows where `rows_of` reads them."""
    for held, values in zip(_held(site), (rows.q, rows.k), strict=True):
        for (tensor, start), value in zip(held, values, strict=True):
            tensor[start : start + len(value)] = value.to(tensor)


def _held(site: QueriesSite) -> tuple[list[Held], list[Held]]:
    attention, parts = site.attention, site.parts
    layers: list[nn.Module] = [part_of(attention, name) for name in parts.qkv]
    first: Any = layers[0]
    second, start = layers[-1], 0
    if isinstance(first, SplitLinear):
        first, second = first.q, first.k
    elif len(layers) == 1:
        start = site.count * site.width
    else:
        second = layers[1]
    q = [(tensor, 0) for tensor in output_tensors(first)]
    k = [(tensor, start) for tensor in output_tensors(second)]
    for held, name in zip((q, k), parts.biases or (), strict=False):
        if getattr(attention, name) is not None:
            held.append((getattr(attention, name), 0))
    return q, k


def weight_energies(site: QueriesSite) -> Tensor:
    """What each feature carries by its weights alone, H D."""
    size = site.count * site.width
    if len(site.parts.qkv) == 1:
        both = weight_of(part_of(site.attention, site.parts.qkv[0]))[: 2 * size].chunk(2)
    else:
        both = tuple(weight_of(part_of(site.attention, name)) for name in site.parts.qkv[:2])
    energies = [rows.double().cpu().square().sum(1).view(site.count, -1) for rows in both]
    both_ways: Tensor = energies[0] * energies[1]
    return both_ways
