"""How much each branch of a residual stream is worth; the least goes first."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft_vision.backbones.sites import Backbone
from peft_vision.layers.quantized import Quantized
from peft_vision.layers.surgery import weight_of
from peft_vision.pruners._path_probe import Branch, Probe

Scores = dict[Branch, float]

Score = Callable[[Probe, Mapping[Branch, nn.Module]], Scores]
"""By what each of these substitutes, put alone at a branch's place, changes."""


def harms(probe: Probe, substitutes: Mapping[Branch, nn.Module]) -> Scores:
    """What happens to the output (see `Probe.harm`)."""
    return probe.harms(substitutes)


def taylor(probe: Probe, substitutes: Mapping[Branch, nn.Module]) -> Scores:
    """How far the answer moves, to first order: per image, then the mean of its size over images.

    That is the product of what the stream would gain or lose there with its gradient, so that one
    backward pass serves all branches. With nothing as a substitute: gradient times value.
    """
    totals = dict.fromkeys(substitutes, 0.0)
    for number, batch in enumerate(probe.batches):
        seen: dict[Branch, tuple[Tensor, Tensor]] = {}
        probe.trunk.observer = lambda i, half, *pair, kept=seen: kept.update({(i, half): pair})
        try:
            with torch.enable_grad():
                stream = probe.start(batch, batch.x.clone().requires_grad_())
                answers = probe.answers(number, probe.finish(batch, 0, stream))
                wanted = [seen[branch][1] for branch in substitutes]
                gradients = torch.autograd.grad(answers.sum(), wanted, allow_unused=True)
        finally:
            probe.trunk.observer = None
        for (branch, module), gradient in zip(substitutes.items(), gradients, strict=True):
            if gradient is not None:
                moved = probe.change(branch, module, *seen[branch]) * gradient
                totals[branch] += float(moved.flatten(1).sum(1).abs().sum())
    return {branch: total / probe.count for branch, total in totals.items()}


def influence(probe: Probe, substitutes: Mapping[Branch, nn.Module]) -> Scores:
    """1 - cos(stream behind the substitute, stream behind a branch), mean over tokens and images.

    With nothing as a substitute, the former is the stream before the branch.
    """
    totals, counts = dict.fromkeys(substitutes, 0.0), dict.fromkeys(substitutes, 0)

    def note(branch: Branch, behind: Tensor, added: Tensor) -> None:
        if branch in totals:
            change = probe.change(branch, substitutes[branch], behind, added)
            cosine = F.cosine_similarity(behind.double() + change, behind.double(), dim=-1)
            totals[branch] += float((1 - cosine).sum())
            counts[branch] += cosine.numel()

    probe.observe(note)
    return {branch: totals[branch] / counts[branch] for branch in substitutes}


BY_IMAGES: dict[str, Score] = {"leave_one_out": harms, "taylor": taylor, "influence": influence}


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
