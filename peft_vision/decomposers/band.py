"""Large depthwise kernels as small squares, rows, columns and nothing (InceptionNeXt)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from peft_vision.backbones.sites import Backbone, LayerSite
from peft_vision.decomposers._ladder import Ladder, Rung, climb
from peft_vision.decomposers._layers import places_of
from peft_vision.errors import BadSetting, DamagedArtifact, UnsupportedSite
from peft_vision.layers.branch_conv import KINDS, BranchConv, central
from peft_vision.layers.layer_shape import why_not_plain
from peft_vision.method import Evidence, Method, Stage, check_range
from peft_vision.plan import Decisions, pack_indices, unpack_indices


@dataclass(frozen=True)
class Band(Method):
    """Replace large depthwise kernels by a small square, a row, a column or nothing, per channel.

    A channel becomes what holds most of its kernel's energy; those that lose least for what they
    save go first, over the whole model. The model has to be trained afterwards.
    """

    ratio: float = 0.5
    """Share that `wrap` takes of the multiply-accumulates that can be saved, in [0, 1]."""

    square: int = 3
    """Side of the small square, odd, at least 1."""

    identity: float = 0.625
    """Share of a layer's channels that may pass without a kernel, in [0, 1]."""

    smallest: int = 5
    """Kernels of at least this size are large, 3 to 1000."""

    stage: ClassVar[Stage] = Stage.FACTOR
    reduces: ClassVar[frozenset[str]] = frozenset({"flops", "params", "latency_ms"})

    def __post_init__(self) -> None:
        check_range("ratio", self.ratio, 0.0, 1.0)
        check_range("identity", self.identity, 0.0, 1.0)
        check_range("smallest", self.smallest, 3, 1000)
        if not isinstance(self.square, int) or self.square < 1 or self.square % 2 == 0:
            raise BadSetting(f"square is {self.square!r}; an odd number of at least 1 works.")

    @property
    def strength(self) -> float:
        """The ratio."""
        return self.ratio

    def decide(self, backbone: Backbone, strength: float, evidence: Evidence) -> Decisions:
        """Per layer, the channels of each kind, as bit sets."""
        sites = self._sites(backbone)
        ladders = evidence.once(
            ("kernels", self), lambda: [one for site in sites for one in self._ladders(site)]
        )
        kinds: dict[str, dict[str, list[int]]] = {}
        for key, (code,) in climb(ladders, strength).items():
            name, _, channel = key.rpartition("#")
            kinds.setdefault(name, {}).setdefault(KINDS[code], []).append(int(channel))
        of = {site.key: int(site.layer.out_channels) for site in sites}  # type: ignore[arg-type]
        return {
            site.key: {k: pack_indices(members, of[site.key]) for k, members in found.items()}
            for site in sites
            if (found := kinds.get(site.key))
        }

    def _sites(self, backbone: Backbone) -> list[LayerSite]:
        found = [site for site in backbone.convs if not self._why_not(site)]
        if not found:
            raise UnsupportedSite(
                f"{type(backbone.model).__name__} has no depthwise convolution over two axes with "
                f"a square kernel of at least {self.smallest} that keeps its grid; ConvNeXt and "
                "RepLKNet have some."
            )
        return found

    def _why_not(self, site: LayerSite) -> str:
        layer = site.layer
        if isinstance(site.owner, BranchConv) or type(layer) is not nn.Conv2d:
            return "it is no plain convolution of its own"
        side = layer.kernel_size[0]
        depthwise = layer.groups == layer.in_channels == layer.out_channels
        grid = layer.stride == (1, 1) and layer.dilation == (1, 1)
        padded = layer.padding in ("same", (side // 2, side // 2))
        odd = layer.kernel_size == (side, side) and side % 2 == 1
        if depthwise and grid and padded and odd and side >= self.smallest > self.square:
            return why_not_plain(layer)
        return "it is not depthwise, or its kernel is small, or it changes the grid"

    def _ladders(self, site: LayerSite) -> Iterator[Ladder]:
        """The options of each channel, from the whole kernel to none."""
        weight: Tensor = site.layer.weight.detach().double().cpu()  # type: ignore[operator]
        side = int(weight.shape[-1])
        whole = weight.square().sum((1, 2, 3)).clamp_min(1e-30)
        shapes = [(self.square, self.square), (1, side), (side, 1)]
        held = torch.stack([central(weight, s).square().sum((1, 2, 3)) for s in shapes]) / whole
        delta = torch.zeros_like(weight)
        delta[:, :, side // 2, side // 2] = 1.0
        passing = (weight - delta).square().sum((1, 2, 3)) / whole
        free = int(self.identity * len(weight))
        pass_on = {int(channel) for channel in torch.argsort(passing, stable=True)[:free]}
        for channel in range(len(weight)):
            lost, kind = (1 - held[:, channel]).min(0)
            rungs = [Rung((int(kind),), shapes[int(kind)][0] * shapes[int(kind)][1], float(lost))]
            if channel in pass_on:
                rungs.append(Rung((KINDS.index("identity"),), 0, float(passing[channel])))
            yield Ladder(f"{site.key}#{channel}", side * side, tuple(rungs))

    def apply(self, backbone: Backbone, decisions: Decisions) -> None:
        """Put the divided convolutions in place."""
        sites = {site.key: site for site in backbone.convs}
        for key, decision in decisions.items():
            layer = sites[key].layer
            if not isinstance(decision, dict) or not set(decision) <= set(KINDS):
                raise DamagedArtifact(f"The plan's decision on {key} is not one: {decision!r}.")
            if reason := self._why_not(sites[key]):
                raise UnsupportedSite(f"{key} cannot be divided: {reason}.")
            channels = {kind: unpack_indices(members) for kind, members in decision.items()}
            assert isinstance(layer, nn.Conv2d)
            made = BranchConv.instead_of(layer, channels, self.square)
            for owner, name in list(places_of(backbone.model, layer)):
                setattr(owner, name, made)
