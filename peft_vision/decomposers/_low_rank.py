"""Low-rank pieces of matrices and tensors that the decompositions are made of."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def leading(matrix: Tensor, rank: int) -> Tensor:
    """An orthonormal basis of the `rank` leading left singular vectors: M N -> M R.

    By eigenvectors of the smaller Gram matrix; what a product with the basis and back loses at
    full rank is rounding, whatever the eigenvectors' accuracy.
    """
    rows, columns = matrix.shape
    if rows <= columns:
        found: Tensor = torch.linalg.eigh(matrix @ matrix.t())[1][:, rows - rank :].flip(1)
        return found
    right = torch.linalg.eigh(matrix.t() @ matrix)[1][:, columns - rank :].flip(1)
    basis: Tensor = torch.linalg.qr(matrix @ right)[0]
    return basis


def energy(matrices: Tensor) -> Tensor:
    """Squared singular values, falling, summed over matrices: G M N -> min(M, N)."""
    if matrices.shape[1] > matrices.shape[2]:
        matrices = matrices.transpose(1, 2)
    values = torch.linalg.eigvalsh(matrices @ matrices.transpose(1, 2))
    summed: Tensor = values.clamp_min(0).sum(0).flip(0)
    return summed.cpu()


def train(tensor: Tensor, ranks: Sequence[int]) -> list[Tensor]:
    """Cores r x n x r' of a tensor, split off one after the other (Oseledets, 2011).

    Args:
        ranks: of the bonds between its axes, one fewer than these.
    """
    cores, rest, before = [], tensor, 1
    for size, rank in zip(tensor.shape[:-1], ranks, strict=True):
        matrix = rest.reshape(before * size, -1)
        basis = leading(matrix, rank)
        cores.append(basis.reshape(before, size, rank))
        rest, before = basis.t() @ matrix, rank
    return [*cores, rest.reshape(before, -1, 1)]


def bonds(ranks: Sequence[int], sizes: Sequence[int]) -> tuple[int, ...]:
    """The ranks between axes of these sizes, none larger than what its neighbors can carry."""
    found = list(ranks)
    for places in (range(len(found)), reversed(range(len(found)))):
        for place in places:
            before = found[place - 1] if place else 1
            behind = found[place + 1] if place + 1 < len(found) else 1
            found[place] = min(found[place], before * sizes[place], behind * sizes[place + 1])
    return tuple(found)


def whole(sizes: Sequence[int]) -> tuple[int, ...]:
    """The ranks between axes of these sizes at which nothing is lost."""
    return bonds([math.prod(sizes)] * (len(sizes) - 1), sizes)


def balanced(weights: Sequence[Tensor]) -> list[Tensor]:
    """Scale each channel between two factors so that both give it the same norm.

    Args:
        weights: outputs, inputs, kernel of each factor; a depthwise one has 1 input.
    """
    found = list(weights)
    for place in range(len(found) - 1):
        one, other = found[place], found[place + 1]
        axis = 1 if other.shape[1] == one.shape[0] else 0
        given = one.flatten(1).norm(dim=1)
        read = other.movedim(axis, 0).flatten(1).norm(dim=1)
        usable = (given > 0) & (read > 0)
        scale = torch.where(usable, (read / given.clamp_min(1e-300)).sqrt(), torch.ones_like(given))
        found[place] = one * scale.reshape(-1, *[1] * (one.dim() - 1))
        spread = [1] * other.dim()
        spread[axis] = -1
        found[place + 1] = other / scale.reshape(spread)
    return found


def along(vectors: Tensor, kernel: Sequence[int], axes: Sequence[int]) -> Tensor:
    """Give O x I x (sizes of `axes`) the axes of a kernel; those not named have size 1."""
    sizes = [size if axis in axes else 1 for axis, size in enumerate(kernel)]
    return vectors.reshape(*vectors.shape[:2], *sizes)


def with_tensorly(run: Callable[[Any], Any]) -> Any:
    """What `run` makes with tensorly on torch tensors; the user's choice of backend stays."""
    import tensorly

    with tensorly.backend_context("pytorch", local_threadsafe=True):
        return run(tensorly)


def product_of_others(sizes: Sequence[int]) -> int:
    """The rank that suffices for any tensor of these sizes: all but its longest axis."""
    return math.prod(sizes) // max(sizes)
