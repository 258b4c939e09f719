"""Which patch attends to which, guessed at low rank (Sparsifiner; Wei et al., CVPR 2023)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from peft_vision.layers.precision import in_full, wide

SPREAD = 0.02
COEFFICIENTS = 8
"""Of each query, how many coefficients of the basis count."""


class MaskPredictor(nn.Module):
    """Connectivity of patches as a few coefficients times a learned basis, shared by all heads.

    Args:
        width: of a head. `patches`: n; the basis is of maps of this size. `rank`: of the maps.
        like: a parameter whose device and dtype are taken. `seed`: of the first weights.
    """

    def __init__(self, width: int, patches: int, rank: int, like: Tensor, seed: int) -> None:
        super().__init__()
        self.patches = patches
        narrow = max(1, width // 2)
        generator = torch.Generator().manual_seed(seed)
        dtype = torch.promote_types(like.dtype, torch.float32)

        def drawn(*size: int) -> nn.Parameter:
            values = torch.empty(*size)
            nn.init.trunc_normal_(values, std=SPREAD, generator=generator)
            return nn.Parameter(values.to(like.device, dtype))

        self.query, self.key = drawn(narrow, width), drawn(narrow, width)
        self.squeeze, self.basis = drawn(rank, patches), drawn(rank, patches)

    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        """How strongly each patch attends to each, B H n n, from queries and keys B H n D."""
        with in_full(q):
            return self._connected(wide(q), wide(k))

    def _connected(self, q: Tensor, k: Tensor) -> Tensor:
        narrow_q = q @ self.query.t().to(q.dtype)
        narrow_k = self.squeeze.to(k.dtype) @ (k @ self.key.t().to(k.dtype))
        scale = narrow_q.shape[-1] ** -0.5
        weights = (narrow_q @ narrow_k.transpose(-2, -1) * scale).softmax(-1)
        if weights.shape[-1] > COEFFICIENTS:
            top = weights.topk(COEFFICIENTS, dim=-1)
            weights = torch.zeros_like(weights).scatter(-1, top.indices, top.values)
        maps: Tensor = weights @ self.basis.to(weights.dtype)
        return maps
