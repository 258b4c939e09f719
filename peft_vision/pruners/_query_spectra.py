"""How much of attention's logits each feature of queries and keys carries, and the best few.

Logits are products q . k. A constant per query changes no softmax, so keys count around their mean
in the image. With second moments Q of queries and K of such keys, the map of rank n whose logits
q . (A^T B) k come nearest to q . k on average is read off the singular values of Q^1/2 K^1/2: its
square error is the sum of the squares of those left out. A and B go into the weights.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from peft_vision.backbones.queries import QueriesSite
from peft_vision.calibration import Walk
from peft_vision.layers.attention import project
from peft_vision.layers.named_parts import part_of
from peft_vision.layers.surgery import weight_of


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
    last = walk.index == len(trunk.blocks) - 1
    rows = trunk.pooled if last else None
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


@dataclass(frozen=True)
class Rows:
    """The weights and biases that make queries and keys: H D C and H D; None for no bias."""

    q: Tensor
    k: Tensor
    q_bias: Tensor | None
    k_bias: Tensor | None

    def turned(self, a: Tensor, b: Tensor) -> Rows:
        """The same through A and B (H n D)."""
        biases = [
            None if bias is None else (side @ bias[..., None]).squeeze(-1)
            for side, bias in ((a, self.q_bias), (b, self.k_bias))
        ]
        return Rows(a @ self.q, b @ self.k, biases[0], biases[1])


def rows_of(site: QueriesSite) -> Rows | None:
    """In float64; None where a layer is no plain linear, whose rows could be set."""
    held = _held(site)
    if held is None:
        return None
    values = [None if t is None else _by_head(t[rows], site.count) for t, rows in held]
    q, k, q_bias, k_bias = values
    if q is None or k is None:
        raise AssertionError("a linear has a weight")
    return Rows(q, k, q_bias, k_bias)


def _by_head(rows: Tensor, count: int) -> Tensor:
    return rows.detach().double().cpu().reshape(count, -1, *rows.shape[1:])


@torch.no_grad()
def set_rows(site: QueriesSite, rows: Rows) -> None:
    """Put rows where `rows_of` reads them."""
    held = _held(site)
    if held is None:
        raise AssertionError("rows were read from there")
    for (tensor, where), value in zip(
        held, (rows.q, rows.k, rows.q_bias, rows.k_bias), strict=True
    ):
        if tensor is not None and value is not None:
            tensor[where] = value.flatten(0, 1).to(tensor)


def _held(site: QueriesSite) -> list[tuple[Tensor | None, slice]] | None:
    """Weights and biases of queries and keys, and their rows there."""
    attention, parts = site.attention, site.parts
    layers: list[nn.Linear] = [part_of(attention, name) for name in parts.qkv]
    if any(type(layer) is not nn.Linear for layer in layers[:2]):
        return None
    size = site.count * site.width
    fused = len(layers) == 1
    places = [slice(0, size), slice(size, 2 * size) if fused else slice(0, size)]
    both = [layers[0], layers[0] if fused else layers[1]]
    beside = [getattr(attention, name) for name in (parts.biases or ())[:2]]
    held: list[tuple[Tensor | None, slice]] = []
    held += [(layer.weight, where) for layer, where in zip(both, places, strict=True)]
    if beside and beside[0] is not None:
        return [*held, *((bias, slice(0, size)) for bias in beside)]
    held += [(layer.bias, where) for layer, where in zip(both, places, strict=True)]
    return held


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
