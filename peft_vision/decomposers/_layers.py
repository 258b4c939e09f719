"""Which layers are factored, what they cost, and how a chain takes a layer's place."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from peft_vision.backbones.sites import Backbone, LayerSite
from peft_vision.decomposers._arriving import all_layers, arriving_in
from peft_vision.decomposers._fresh import fresh_weights
from peft_vision.decomposers._job import Job
from peft_vision.decomposers._ladder import Ladder, climb, descent, ladder
from peft_vision.decomposers._scheme import Rank, clipped
from peft_vision.errors import DamagedArtifact, UnsupportedSite
from peft_vision.layers.factorized import Factored
from peft_vision.layers.layer_shape import (
    LayerShape,
    Sizes,
    cost_of,
    per_group,
    shape_of,
    why_not_plain,
)
from peft_vision.method import Evidence
from peft_vision.plan import Decisions, Json

UNKNOWN = 32
"""Where a model does not say its input size: outputs along each axis of a layer's grid."""

Spectra = Callable[[Sequence[LayerSite]], Mapping[str, Sequence[Tensor]]]
"""Layers -> energies by key, as `Scheme.energies` gives them from weights alone."""


def decide(
    job: Job,
    backbone: Backbone,
    strength: float,
    evidence: Evidence,
    spectra: Spectra | None = None,
) -> Decisions:
    """Key -> rank of the layers that are factored at this strength.

    Args:
        spectra: where energies do not follow from the weights alone.

    Raises:
        UnsupportedSite: no layer can be, with the reasons.
    """
    sites = chosen(job, backbone)
    if job.rank is not None:
        if strength <= 0:
            return {}
        shapes = [(site.key, shape_of(site.layer)) for site in sites]
        return {k: _decision(clipped(job.rank, job.scheme.full(shape))) for k, shape in shapes}
    ladders = evidence.once(
        (type(job.scheme), job),
        lambda: _ladders(job, backbone, sites, {} if spectra is None else spectra(sites)),
    )
    return {key: _decision(rank) for key, rank in climb(ladders, strength).items()}


def _decision(rank: Rank) -> Json:
    return {"rank": list(rank)}


def chosen(job: Job, backbone: Backbone) -> list[LayerSite]:
    """The layers that the scheme has a rule for.

    Raises:
        UnsupportedSite: there are none; the message says why each kind of layer was left.
    """
    reasons: dict[str, int] = {}
    found = []
    for site in (site for kind in job.kinds for site in getattr(backbone, kind)):
        if isinstance(site.owner, Factored) or isinstance(site.layer, Factored):
            reason = "it is a factor already"
        else:
            reason = why_not_plain(site.layer) or _why_not(job, shape_of(site.layer))
        if reason:
            reasons[reason] = reasons.get(reason, 0) + 1
        else:
            found.append(site)
    if not found:
        listed = "; ".join(f"{count} left because {why}" for why, count in reasons.items())
        raise UnsupportedSite(
            f"{type(backbone.model).__name__} has no layer to factor: of its "
            f"{' and '.join(job.kinds)}, {listed or 'there are none'}."
        )
    return found


def _why_not(job: Job, shape: LayerShape) -> str:
    reason = job.scheme.why_not(shape)
    if not reason and shape.weights < job.minimum:
        return f"it has fewer than {job.minimum} weights (setting `minimum`)"
    return reason


def _ladders(
    job: Job,
    backbone: Backbone,
    sites: Sequence[LayerSite],
    known: Mapping[str, Sequence[Tensor]],
) -> list[Ladder]:
    """The options of each layer.

    Raises:
        UnsupportedSite: no layer has an option that is cheaper than it is.
    """
    arriving = arriving_in(backbone)
    found = []
    for site in sites:
        shape = shape_of(site.layer)
        rows, grid = arriving.get(site.key, (1, tuple(UNKNOWN * step for step in shape.stride)))
        energies = known[site.key] if known else _energies(job, site.layer, shape)
        found.append(_ladder(job, site.key, shape, (rows, grid), energies))
    worth = [one for one in found if one.rungs]
    if not worth:
        raise UnsupportedSite(
            f"{type(backbone.model).__name__}: factors of rank 1 would cost more than the layer in "
            f"all of {len(found)} layers. Pass rank= to factor them nevertheless."
        )
    return worth


def _energies(job: Job, layer: nn.Module, shape: LayerShape) -> Sequence[Tensor] | None:
    weight: Any = layer.weight
    if weight.is_meta:
        return None
    return job.scheme.energies(per_group(weight.detach().double(), shape.groups))


def _ladder(
    job: Job,
    key: str,
    shape: LayerShape,
    seen: tuple[int, Sizes],
    energies: Sequence[Tensor] | None,
) -> Ladder:
    rows, grid = seen

    def cost(rank: Rank) -> int:
        return job.scheme.macs(shape, rank, grid, rows)

    whole = cost_of([shape], grid, rows)
    rungs = [
        rung
        for rung in descent(job.scheme.full(shape), cost, energies)
        if sum(s.weights for s in job.scheme.shapes(shape, rung.rank)) < shape.weights
    ]
    return ladder(key, whole, rungs)


def whole_layers(backbone: Backbone, keys: Iterable[str]) -> list[LayerSite]:
    """The sites of these keys, without those that an earlier method has factored already.

    Several methods may have decided on one layer, each on the whole model; the first takes it.

    Raises:
        KeyError: a key names no site of the backbone.
    """
    sites = {site.key: site for site in all_layers(backbone)}
    parts = {key for key, site in sites.items() if isinstance(site.owner, Factored)}
    taken = parts | {key for key, site in sites.items() if isinstance(site.layer, Factored)}
    return [
        sites[key]
        for key in keys
        if key not in taken and not any(part.startswith(f"{key}.") for part in parts)
    ]


Make = Callable[[str, nn.Module, Rank], Factored]
"""Key of a layer, the layer, the rank -> the chain for it."""


def put_in_place(
    job: Job, backbone: Backbone, decisions: Decisions, make: Make | None = None
) -> None:
    """Factor the layers of these decisions, in place; on `meta` only their structure.

    Args:
        make: where the values of the factors do not follow from the weights alone.

    Raises:
        UnsupportedSite: a layer is not one that the scheme has a rule for.
    """
    backbone.call_every_linear()
    for site in whole_layers(backbone, decisions):
        key, layer = site.key, site.layer
        if reason := why_not_plain(layer) or job.scheme.why_not(shape_of(layer)):
            raise UnsupportedSite(f"{key} cannot be factored: {reason}.")
        rank = _rank_in(key, decisions[key])
        made = factored(job, layer, rank) if make is None else make(key, layer, rank)
        for owner, name in list(places_of(backbone.model, layer)):
            setattr(owner, name, made)


def factored(job: Job, layer: nn.Module, rank: Rank) -> Factored:
    """What takes the place of a plain layer."""
    shape = shape_of(layer)
    shapes = job.scheme.shapes(shape, rank)
    dense: Any = layer
    weight: Tensor = dense.weight.detach()
    if weight.is_meta:
        weights = [weight.new_empty(one.size) for one in shapes]
    elif job.init == "fresh":
        weights = fresh_weights(weight, shapes, lambda w: job.scheme.product(shape, shapes, w))
    else:
        kernels = per_group(weight.double(), shape.groups)
        groups = [job.scheme.weights(kernel, rank) for kernel in kernels]
        weights = [torch.cat(parts) for parts in zip(*groups, strict=True)]
    return job.scheme.put(layer, shapes, weights)


def places_of(model: nn.Module, layer: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """(owner, attribute) of every place at which a model holds a layer."""
    for owner in model.modules():
        for name, child in owner._modules.items():  # noqa: SLF001 - named_children hides ties
            if child is layer:
                yield owner, name


def _rank_in(key: str, decision: Json) -> Rank:
    ranks = decision.get("rank") if isinstance(decision, dict) else None
    if not isinstance(ranks, list) or not all(isinstance(r, int) and r > 0 for r in ranks):
        raise DamagedArtifact(f"The plan's decision on {key} holds no ranks: {decision!r}.")
    return tuple(int(rank) for rank in ranks)  # type: ignore[arg-type]
