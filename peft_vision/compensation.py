"""Compensation: what stays takes over what went, as far as it can be predicted from it.

Where heads or hidden units leave a block, the linear that reads them is fitted again, in closed
form, on calibration images (CORP; SparseGPT and others do the same for single weights). Blocks are
done from first to last on the prefix that is already pruned. Where units are kept for some tokens
only, the router that sends them is fitted first. In the end batch norms take their
statistics again. Only the values of weights change; nothing of it is in the plan, but for a bias
where there was none, which a method decides.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from peft_vision.applying import in_order
from peft_vision.backbones import view
from peft_vision.backbones.queries import QueriesSite, queries_in
from peft_vision.backbones.sites import Backbone, HeadsSite, HiddenSite
from peft_vision.calibration import (
    Center,
    FittedByBlock,
    Moments,
    Walk,
    consumer_of,
    noting,
    rows_of,
)
from peft_vision.decomposers._outputs import ByOutputs
from peft_vision.errors import BadSetting
from peft_vision.layers.absent import Absent
from peft_vision.layers.batch_statistics import batch_norms, estimate_again
from peft_vision.layers.linear_mlp import LinearMlp
from peft_vision.layers.ownership import plain_of
from peft_vision.layers.showing import show
from peft_vision.layers.traits import Routing, masking, teaching
from peft_vision.layers.votes import Half
from peft_vision.method import Method
from peft_vision.plan import Decisions

How = Literal["none", "mean", "ridge"]


@dataclass(frozen=True)
class Compensation:
    """How a linear takes over what its lost inputs contributed.

    Attributes:
        how: "none"; "mean": their mean joins the bias; "ridge": the rest predicts them linearly.
        ridge: added to the diagonal of the covariance, relative to its mean, above 0.
    """

    how: How = "ridge"
    ridge: float = 1e-3

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.how not in ("none", "mean", "ridge"):
            raise BadSetting(f"compensation is {self.how!r}; none, mean or ridge works.")
        if not self.ridge > 0:
            raise BadSetting(f"ridge is {self.ridge!r}; it has to be above 0.")


@dataclass
class _Fit:
    """What a linear reads now (x, B N F) and what its output lacks (r, B N D).

    Attributes:
        cross: sum of outer products of r and x about their shifts, D F. `power`: sum of r squared.
    """

    moments: Moments
    lack: Center
    cross: Tensor
    power: float = 0.0

    @classmethod
    def of(cls, outputs: int, inputs: int) -> _Fit:
        """Nothing seen yet."""
        cross = torch.zeros(outputs, inputs, dtype=torch.float64)
        return cls(Moments.of_width(inputs), Center.of_width(outputs), cross)

    def add(self, x: Tensor, r: Tensor) -> None:
        read, lacking = self.moments.add(x), self.lack.take(r)
        self.cross += (lacking.t() @ read).double().cpu()
        self.power += float(rows_of(r).square().sum(dtype=torch.float64))

    def solve(self, ridge: float | None, *, centered: bool) -> tuple[Tensor, Tensor]:
        """The correction of the weight (D F), and of the bias (D)."""
        seen, mean, lack = self.moments, self.moments.mean, self.lack.mean
        if ridge is None:
            return torch.zeros_like(self.cross), lack
        spread = seen.covariance
        both = self.cross / seen.count - torch.outer(self.lack.offset, seen.center.offset)
        if not centered:
            spread, both = seen.second, both + torch.outer(lack, mean)
        scale = spread.diagonal().mean().clamp_min(1e-30)
        eye = torch.eye(len(mean), dtype=torch.float64)
        weight = torch.linalg.solve(spread + ridge * scale * eye, both.t()).t()
        return weight, lack - weight @ mean


Member = HeadsSite | HiddenSite | QueriesSite


def apply_compensated(
    model: nn.Module,
    methods: Sequence[Method],
    decisions: Sequence[Decisions],
    batches: Iterable[Any],
    how: Compensation,
) -> list[Decisions]:
    """Apply each method's decisions, in place and in order, and fit what stays.

    Args:
        model: a plain model.
        batches: images B 3 H W, or (images, labels) pairs; labels are not looked at.

    Returns:
        What was carried out: without decisions on what an earlier method removed.

    Raises:
        UnsupportedSite: as `Method.apply`.
    """
    unfitted: list[str] = []

    def carry_out(method: Method, decided: Decisions) -> None:
        backbone = view(model)
        per_block = _by_block(backbone, decided) if how.how != "none" and backbone.tokens else {}
        if per_block:
            unfitted.extend(_walk(model, method, decided, per_block, Walk(backbone, batches), how))
        done = {key for keys in per_block.values() for key in keys}
        rest = {key: value for key, value in decided.items() if key not in done}
        if rest and how.how != "none" and isinstance(method, ByOutputs):
            method.apply_on(view(model), rest, batches)
        elif rest:
            method.apply(view(model), rest)

    carried_out = in_order(model, methods, decisions, carry_out)
    if unfitted:
        said = "Not fitted again on the images, so that more is lost there: %s."
        logging.getLogger("peft_vision").warning(said, "; ".join(unfitted))
    if how.how != "none" and any(carried_out) and batch_norms(model):
        estimate_again(model, partial(show, model, batches))
    return carried_out


def _by_block(backbone: Backbone, decided: Decisions) -> dict[int, list[str]]:
    """Block -> keys of the decisions whose loss can be made up for, attention first."""
    found: dict[int, list[str]] = {}
    cut = {site.key: site.block for site in _members(backbone)}
    whole = {f"{s.key}.{half}": s.index for s in backbone.blocks for half in ("attention", "mlp")}
    for key, decision in decided.items():
        fitted = isinstance(decision, dict) and ("absent" in decision or "linear" in decision)
        if key in cut or (key in whole and fitted):
            found.setdefault(cut[key] if key in cut else whole[key], []).append(key)
    for keys in found.values():
        keys.sort(key=lambda key: key.rpartition(".")[2] == "hidden" or key.endswith(".mlp"))
    return found


def _walk(
    model: nn.Module,
    method: Method,
    decided: Decisions,
    per_block: dict[int, list[str]],
    walk: Walk,
    how: Compensation,
) -> list[str]:
    """Carry decisions out block by block, each fitted on the way; what could not be, and why."""
    last, unfitted = max(per_block), []
    for index in range(last + 1):
        for key in per_block.get(index, ()):
            one = {key: decided[key]}
            site = _member(model, key)
            if site is None:
                half: Half = "attention" if key.endswith(".attention") else "mlp"
                branch = _branch(walk, half)
                method.apply(view(model), one)
                _fit_branch(walk, half, branch, how)
                continue
            before, seen = _routing(site), _look(walk, site)
            if isinstance(method, FittedByBlock) and how.how == "ridge":
                method.apply_at(view(model), one, walk)
            else:
                method.apply(view(model), one)
            again = _member(model, key)
            if again is not None:
                routing = _routing(again)
                if routing is not None and before is None:  # what was taught before stays
                    with teaching(routing, how.ridge):
                        _run(walk, again, seen)
                unfitted.append(_fit(walk, again, seen, how))
        if index < last:
            walk.advance()
    return [why for why in unfitted if why]


@dataclass
class _Branch:
    """What a block's MLP read and gave, M D each, and what a branch added to the stream, B N D."""

    read: list[Tensor]
    gave: list[Tensor]
    added: list[Tensor]


def _branch(walk: Walk, half: Half) -> _Branch:
    branch = _Branch([], [], [])

    def observe(_: int, which: Half, __: Tensor, added: Tensor) -> None:
        if which == half:
            branch.added.append(added.detach())

    def note(_: int, arriving: Tensor, leaving: Tensor) -> None:
        branch.read.append(rows_of(arriving))
        branch.gave.append(rows_of(leaving))

    walk.trunk.observer = observe
    try:
        walk.watch([getattr(walk.block, walk.trunk.parts.mlp)], note)
    finally:
        walk.trunk.observer = None
    return branch


def _fit_branch(walk: Walk, half: Half, branch: _Branch, how: Compensation) -> None:
    """The mean of a branch that went, or the best linear map in place of an MLP."""
    parts = walk.trunk.parts
    module = getattr(walk.block, parts.attention if half == "attention" else parts.mlp)
    if isinstance(module, Absent):
        module.fit(torch.cat(branch.added))
    elif isinstance(module, LinearMlp):
        module.fit(torch.cat(branch.read), torch.cat(branch.gave), ridge=how.ridge)


@dataclass
class _Seen:
    """What a site's linear should give after the cut, and what arrived at the site's module."""

    wanted: list[Tensor]
    arrived: list[Tensor]


def _look(walk: Walk, site: Member) -> _Seen:
    seen = _Seen([], [])

    def note(number: int, arriving: Tensor, leaving: Tensor) -> None:
        if number:
            seen.wanted.append(leaving.detach())
        else:
            seen.arrived.append(arriving.detach())

    with masking(_routing(site)):
        walk.watch([_alone(site) or consumer_of(site), consumer_of(site)], note)
    return seen


@torch.no_grad()
def _run(walk: Walk, site: Member, seen: _Seen) -> None:
    """The site's module on what arrived there, or all of its block."""
    module = _alone(site)
    if module is None:
        walk.run()
        return
    for arrived in seen.arrived:
        module(arrived)


def _alone(site: Member) -> Any:
    """What can be run without its block: an MLP, with what routes its units."""
    return (_routing(site) or site.mlp) if isinstance(site, HiddenSite) else None


def _members(backbone: Backbone) -> list[Member]:
    return [*backbone.heads, *backbone.hidden, *queries_in(backbone)]


def _member(model: nn.Module, key: str) -> Member | None:
    return next((site for site in _members(view(model)) if site.key == key), None)


def _routing(site: Member) -> Routing | None:
    """What sends tokens to some of a site's heads or units, if anything does."""
    around = getattr(site.owner, site.attribute).modules()
    return next((module for module in around if isinstance(module, Routing)), None)


def _fit(walk: Walk, site: Member, seen: _Seen, how: Compensation) -> str:
    """Correct a linear, below its adapters, so that it gives what it gave before, as far as it can.

    Returns:
        Why that cannot be; empty where it could.
    """
    layer = consumer_of(site)
    plain = plain_of(layer)
    if type(plain) is not nn.Linear or not plain.weight.is_floating_point():
        return f"{site.key}: a {type(plain).__name__} reads it"
    if how.how == "mean" and plain.bias is None:
        return f"{site.key}: the linear that reads it has no bias that could take a mean"
    found = _lacking(walk, site, seen, plain)
    if found.moments.count == 0:
        return ""
    ridge = how.ridge if how.how == "ridge" else None
    more, shift = found.solve(ridge, centered=plain.bias is not None)
    with torch.no_grad():
        before = [p.clone() for p in plain.parameters()]
        plain.weight.add_(more.to(plain.weight))
        if plain.bias is not None:
            plain.bias.add_(shift.to(plain.bias))
        # What stands around it may turn the correction into something else.
        if plain is layer or _lacking(walk, site, seen, plain).power <= 1.01 * found.power:
            return ""
        for parameter, value in zip(plain.parameters(), before, strict=True):
            parameter.copy_(value)
    return f"{site.key}: what its {type(layer).__name__} gives is no sum with what its base gives"


def _lacking(walk: Walk, site: Member, seen: _Seen, plain: nn.Linear) -> _Fit:
    """What a plain linear reads, and what is lacking behind whatever stands around it."""
    sums = _Fit.of(*plain.weight.shape)
    wanted, read = iter(seen.wanted), []

    def note(number: int, x: Tensor, out: Tensor) -> None:
        if number == 0:
            read.append(x)
            return
        want = next(wanted)  # of the first tokens alone, where the others are not read
        sums.add(read.pop()[:, : want.shape[1]], want - out[:, : want.shape[1]])

    with noting([plain, consumer_of(site)], note), masking(_routing(site)):
        _run(walk, site, seen)
    return sums
