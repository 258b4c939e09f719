"""In which order branches of a residual stream may go: the least useful first."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft_vision.backbones.sites import Backbone
from peft_vision.layers.absent import Absent
from peft_vision.layers.linear_mlp import LinearMlp
from peft_vision.layers.quantized import Quantized
from peft_vision.layers.surgery import weight_of
from peft_vision.pruners._path_probe import Branch, Probe

Scores = dict[Branch, float]
Step = tuple[Branch, bool]
"""A branch that goes, and whether its mean stays."""

Substitutes = Callable[[Probe, Sequence[Branch]], dict[Branch, nn.Module]]
"""What is to stand at the place of each of these branches, as the probe is now."""


def may_go(branch: Branch, left: Collection[Branch]) -> bool:
    """Whether a branch of the same kind would be left: a network without any is not one."""
    return sum(other[1] == branch[1] for other in left) > 1


def one_shot(scores: Scores, left: Collection[Branch]) -> list[Branch]:
    """All that may go, by scores taken once."""
    order: list[Branch] = []
    remaining = set(left)
    for branch in sorted(scores, key=lambda b: scores[b]):
        if may_go(branch, remaining):
            order.append(branch)
            remaining.discard(branch)
    return order


def greedy(
    probe: Probe,
    candidates: Sequence[Branch],
    left: Collection[Branch],
    substitutes: Substitutes,
    *,
    empties: bool = False,
) -> list[Step]:
    """All that may go, scored again after each one that has gone.

    Args:
        left: every branch there is.
        empties: the last of a kind may go too.
    """
    order: list[Step] = []
    remaining = set(left)
    while True:
        free = [b for b in candidates if b in remaining and (empties or may_go(b, remaining))]
        if not free:
            return order
        ready = substitutes(probe, free)
        harms = probe.harms(ready)
        best = min(free, key=lambda b: harms[b])
        stand_in = ready[best]
        # A mean that a few extreme tokens make can be worse than nothing.
        if isinstance(stand_in, Absent) and stand_in.offset is not None:
            bare: dict[Branch, nn.Module] = {best: Absent()}
            if probe.harms(bare)[best] < harms[best]:
                stand_in = bare[best]
        probe.put(best, stand_in)
        remaining.discard(best)
        order.append((best, not isinstance(stand_in, Absent) or stand_in.offset is not None))


def absent(probe: Probe, branches: Sequence[Branch]) -> dict[Branch, nn.Module]:
    """Nothing, at each branch's place."""
    return {branch: Absent() for branch in branches}


def means(probe: Probe, branches: Sequence[Branch]) -> dict[Branch, nn.Module]:
    """The mean of what each branch adds now, at its place (see `Absent`)."""
    totals: dict[Branch, Tensor] = {}
    counts: dict[Branch, int] = {}

    def note(branch: Branch, _: Tensor, added: Tensor) -> None:
        own = probe.trunk.prefix
        first, rest = added[:, :own].double().sum(0), added[:, own:].double().mean(1).sum(0)
        sums = torch.cat([first, rest.nan_to_num().unsqueeze(0)])
        totals[branch] = totals[branch] + sums if branch in totals else sums
        counts[branch] = counts.get(branch, 0) + len(added)

    probe.observe(note)
    like = next(probe.model.parameters())
    made: dict[Branch, nn.Module] = {}
    for branch in branches:
        mean = (totals[branch] / counts[branch]).to(like)
        stand_in = Absent(mean.shape[-1], probe.trunk.prefix).to(like.device, like.dtype)
        stand_in.fit(mean.unsqueeze(0))
        made[branch] = stand_in.requires_grad_(False)
    return made


def fitted(probe: Probe, branches: Sequence[Branch]) -> dict[Branch, nn.Module]:
    """The best linear map of what each MLP does now, at its place."""
    gathered = {branch: _Pairs() for branch in branches}
    handles = [
        probe.module(b).register_forward_hook(
            lambda _, given, out, b=b: gathered[b].add(given[0], out)
        )
        for b in branches
    ]
    try:
        probe.observe(lambda *_: None)
    finally:
        for handle in handles:
            handle.remove()
    parts = probe.site.parts.mlp_parts
    made: dict[Branch, nn.Module] = {}
    for branch in branches:
        linear = LinearMlp.instead_of(probe.module(branch), parts, zero=True)
        linear.fit_moments(*gathered[branch].means())
        made[branch] = linear.requires_grad_(False)
    return made


def composed(probe: Probe, branches: Sequence[Branch]) -> dict[Branch, nn.Module]:
    """The product of its two linears, at each MLP's place."""
    parts = probe.site.parts.mlp_parts
    return {b: LinearMlp.instead_of(probe.module(b), parts).requires_grad_(False) for b in branches}


class _Pairs:
    """Sums over pairs of vectors, in float64."""

    def __init__(self) -> None:
        self.count = 0
        self.sums: list[Tensor] = []

    def add(self, inputs: Tensor, outputs: Tensor) -> None:
        """Take in ... D and ... D."""
        x, y = (t.detach().flatten(0, -2).double() for t in (inputs, outputs))
        new = [x.sum(0), y.sum(0), x.t() @ x, x.t() @ y]
        self.sums = [a + b for a, b in zip(self.sums, new, strict=True)] if self.sums else new
        self.count += len(x)

    def means(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of inputs, of outputs, and of both outer products."""
        x, y, xx, xy = (total / self.count for total in self.sums)
        return x, y, xx, xy


def taylor(probe: Probe, branches: Sequence[Branch]) -> Scores:
    """|d answer / d w| at w = 1, where w scales a branch: per image, then the mean over images.

    The derivative is the product of what a branch adds with the gradient of the stream behind it,
    so that one backward pass serves all branches.
    """
    totals = dict.fromkeys(branches, 0.0)
    for batch in probe.batches:
        added: dict[Branch, Tensor] = {}
        probe.trunk.observer = lambda index, half, _, a, kept=added: kept.update({(index, half): a})
        try:
            with torch.enable_grad():
                stream = probe.start(batch, batch.x.clone().requires_grad_())
                answers = probe.answers(probe.finish(batch, 0, stream))
                wanted = [added[branch] for branch in branches]
                gradients = torch.autograd.grad(answers.sum(), wanted, allow_unused=True)
        finally:
            probe.trunk.observer = None
        for branch, value, gradient in zip(branches, wanted, gradients, strict=True):
            if gradient is not None:
                per_image = (value.detach() * gradient).double().flatten(1).sum(1)
                totals[branch] += float(per_image.abs().sum())
    return totals


def influence(probe: Probe, branches: Sequence[Branch]) -> Scores:
    """1 - cos(stream before a branch, stream behind it), mean over tokens and images."""
    totals, counts = dict.fromkeys(branches, 0.0), dict.fromkeys(branches, 0)

    def note(branch: Branch, behind: Tensor, added: Tensor) -> None:
        if branch in totals:
            cosine = F.cosine_similarity(behind.double() - added.double(), behind.double(), dim=-1)
            totals[branch] += float((1 - cosine).sum())
            counts[branch] += cosine.numel()

    probe.observe(note)
    return {branch: totals[branch] / counts[branch] for branch in branches}


def norms(backbone: Backbone, branches: Iterable[Branch]) -> Scores:
    """Frobenius norm of a branch's last linear, behind LayerScale, relative to others of its kind.

    A weak hint: it knows nothing of what arrives there. The first and the last block, which are
    usually the worst to lose, come last.
    """
    wanted, found = set(branches), {}
    roles = {"out": "attention", "down": "mlp"}
    for site in backbone.linears:
        for branch in wanted:
            if site.block == branch[0] and roles.get(site.role) == branch[1]:
                scale = _scale(backbone, branch)
                found[branch] = float((scale * _weight(site.layer).double()).norm())
    ends = {0, len(backbone.blocks) - 1}
    scores: Scores = {}
    for half in ("attention", "mlp"):
        own = {b: norm for b, norm in found.items() if b[1] == half}
        mean = math.fsum(own.values()) / max(len(own), 1)
        scores |= {
            b: norm / (mean or 1.0) + (1e6 if b[0] in ends else 0.0) for b, norm in own.items()
        }
    return scores


def _weight(layer: nn.Module) -> Tensor:
    return layer.dequantized() if isinstance(layer, Quantized) else weight_of(layer)


def _scale(backbone: Backbone, branch: Branch) -> Tensor:
    """What LayerScale multiplies the rows of a branch's last linear with: D 1, or one."""
    if backbone.tokens is None:
        raise AssertionError("the caller requires tokens")
    parts, block = backbone.tokens.parts, backbone.blocks[branch[0]].block
    result = torch.ones((), dtype=torch.float64)
    for name in parts.after1 if branch[1] == "attention" else parts.after2:
        part = getattr(block, name)
        held = list(part.parameters()) if isinstance(part, nn.Module) else [part]
        for value in held:
            if value is not None and value.dim() == 1:
                result = value.detach().double().unsqueeze(1)
    return result
