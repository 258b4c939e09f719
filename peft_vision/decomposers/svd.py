"""Singular value decomposition: a matrix as a thin one behind another (Denton et al., 2014)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peft_vision.backbones.sites import Backbone, LayerSite
from peft_vision.decomposers._factoring import Factoring
from peft_vision.decomposers._job import Job, check, check_kinds
from peft_vision.decomposers._layers import decide, put_in_place, whole_layers
from peft_vision.decomposers._low_rank import balanced, energy
from peft_vision.decomposers._outputs import ByOutputs, Outputs, portions, seen_by, spectra
from peft_vision.decomposers._scheme import Rank, Scheme
from peft_vision.layers.factorized import Factored, chain
from peft_vision.layers.layer_shape import LayerShape, per_group
from peft_vision.method import Evidence
from peft_vision.plan import Decisions


@dataclass(frozen=True)
class Svd(Factoring, ByOutputs):
    """Replace a linear, a 1 x 1 convolution or a patch embedding by two with R channels between.

    With images it is the error of the layer's output that is made least, not the weight's.
    """

    ratio: float = 0.5
    """Share that `wrap` takes of the multiply-accumulates that can be saved, in [0, 1]."""

    rank: int | None = None
    """Channels between the two (in each group), the same in every layer, at least 1; then every
    layer is factored, also where that saves nothing. None: as `ratio` or a budget says."""

    init: str = "dense"
    """First values: "dense", nearest to the layer's weight; "fresh", random values of its size."""

    layers: tuple[str, ...] = ("linears", "convs")
    """Which: "linears", "convs", "classifier"."""

    minimum: int = 512
    """Layers with fewer weights than this stay as they are."""

    def __post_init__(self) -> None:
        check(self.ratio, self.rank, self.init, self.minimum)
        check_kinds(self.layers)

    def decide(self, backbone: Backbone, strength: float, evidence: Evidence) -> Decisions:
        """Per layer, the rank."""
        batches = evidence.batches
        if batches is None or self.init == "fresh":
            return super().decide(backbone, strength, evidence)

        def seen(sites: Sequence[LayerSite]) -> dict[str, list[Tensor]]:
            return {key: [values] for key, values in spectra(backbone, sites, batches).items()}

        return decide(self.job(), backbone, strength, evidence, seen)

    def apply_on(self, backbone: Backbone, decisions: Decisions, batches: Iterable[Any]) -> None:
        """Put the pairs in place, fitted to what the layers give on these images."""
        if self.init == "fresh":
            self.apply(backbone, decisions)
            return
        backbone.call_every_linear()
        job = self.job()
        for portion in portions(whole_layers(backbone, decisions)):
            seen = seen_by(backbone.model, portion, batches)
            few = {site.key: decisions[site.key] for site in portion}
            put_in_place(job, backbone, few, lambda key, *rest, s=seen: _fitted(job, s[key], *rest))

    def job(self) -> Job:
        """See `Factoring`."""
        return Job(_Matrix(), self.layers, self.rank, self.init, self.minimum)


@dataclass(frozen=True)
class _Matrix(Scheme):
    """Outputs x everything that one output reads."""

    def why_not(self, shape: LayerShape) -> str:
        """Kernels that overlap read their inputs several times; other methods are for these."""
        plain = not any(shape.padding) and all(spread == 1 for spread in shape.dilation)
        apart = shape.stride == shape.kernel and plain
        if shape.wide and not apart:
            return "its kernel is longer than 1 and overlaps its neighbors"
        return ""

    def full(self, shape: LayerShape) -> Rank:
        """The smaller side of one group's matrix."""
        outputs = shape.outputs // shape.groups
        return (min(outputs, shape.weights // shape.outputs),)

    def shapes(self, shape: LayerShape, rank: Rank) -> list[LayerShape]:
        """The first does what the layer does on the grid; the second mixes channels."""
        between = shape.groups * rank[0]
        axes = range(len(shape.kernel))
        return [
            shape.between(shape.inputs, between, axes, shape.groups),
            shape.between(between, shape.outputs, (), shape.groups),
        ]

    def weights(self, kernel: Tensor, rank: Rank) -> list[Tensor]:
        """The nearest of this rank (Eckart and Young, 1936)."""
        left, values, right = torch.linalg.svd(kernel.flatten(1), full_matrices=False)
        size = rank[0]
        first = (values[:size, None] * right[:size]).reshape(size, *kernel.shape[1:])
        last = left[:, :size].reshape(-1, size, *[1] * (kernel.dim() - 2))
        return balanced([first, last])

    def energies(self, kernels: Tensor) -> list[Tensor]:
        """Squared singular values."""
        return [energy(kernels.flatten(2))]


@torch.no_grad()
def _fitted(job: Job, seen: Outputs, layer: nn.Module, rank: Rank) -> Factored:
    """The pair that comes nearest to what a layer gave; its bias makes up for the mean."""
    dense: Any = layer
    kernels = per_group(dense.weight.double(), seen.shape.groups)
    varied = seen.variation(kernels, centered=dense.bias is not None).to(kernels.device)
    bases = torch.linalg.eigh(varied)[1][:, :, -rank[0] :]
    pairs = [
        balanced([(u.t() @ k.flatten(1)).reshape(-1, *k.shape[1:]), _behind(u, k.dim())])
        for u, k in zip(bases, kernels, strict=True)
    ]
    weights = [torch.cat(parts) for parts in zip(*pairs, strict=True)]
    made = chain(layer, job.scheme.shapes(seen.shape, rank), weights)
    if made.bias is not None and seen.count:
        mean = (seen.total / seen.count).to(bases) - per_group(made.bias.double(), len(bases))
        lost = mean - torch.einsum("gor,gpr,gp->go", bases, bases, mean)
        made.bias.add_(lost.flatten().to(made.bias))
    return made


def _behind(basis: Tensor, dim: int) -> Tensor:
    return basis.reshape(*basis.shape, *[1] * (dim - 2))
