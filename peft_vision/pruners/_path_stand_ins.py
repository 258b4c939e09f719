"""What may stand where a branch was, while images say which branch matters least."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft_vision.layers.absent import Absent
from peft_vision.layers.linear_mlp import LinearMlp
from peft_vision.pruners._path_probe import Branch, Probe

Substitutes = Callable[[Probe, Sequence[Branch]], dict[Branch, nn.Module]]
"""What is to stand at the place of each of these branches, as the probe is now."""


def absent(probe: Probe, branches: Sequence[Branch]) -> dict[Branch, nn.Module]:
    """Nothing, at each branch's place."""
    return {branch: Absent() for branch in branches}


def means(probe: Probe, branches: Sequence[Branch]) -> dict[Branch, nn.Module]:
    """The mean of what each branch adds now, at its place (see `Absent`)."""
    totals: dict[Branch, Tensor] = {}
    counts: dict[Branch, int] = {}

    def note(branch: Branch, _: Tensor, added: Tensor) -> None:
        own, wide = probe.trunk.prefix, added.double()
        patches = wide[:, own:].sum(1) / max(1, added.shape[1] - own)
        # Where the pooled tokens alone go on, nobody reads what the others would be given.
        first = F.pad(wide[:, :own], (0, 0, 0, max(0, own - added.shape[1])))
        sums = torch.cat([first.sum(0), patches.sum(0, keepdim=True)])
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
