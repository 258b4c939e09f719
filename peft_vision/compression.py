"""`compress`: a smaller model that meets a stated budget, proven by counting it again."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from peft_vision.backbones import view
from peft_vision.budget import Budget, Quantity, parse_one
from peft_vision.compressed import CompressedModel
from peft_vision.cost import (
    Cost,
    measure,
    unwrap,
)
from peft_vision.errors import BadSetting, BudgetUnreachable, UnsupportedSite
from peft_vision.history import History, fingerprint
from peft_vision.loading import load
from peft_vision.merging import merge
from peft_vision.method import Adapter, Evidence, Method, make, name_of
from peft_vision.plan import Decisions, Plan, Step
from peft_vision.presets import expand
from peft_vision.pricing import Pricing, apply_all
from peft_vision.search import Found, in_band, search
from peft_vision.wrapping import is_adapted

DEFAULT = "balanced"


@dataclass
class Result:
    """What `compress` returns.

    Attributes:
        model: the compressed model; the model that went in is untouched.
        before: cost of the model that went in. `cost`: of the result, counted after it was built.
        budget: what was asked. `limit`: the absolute figure. `got`: what the result costs in it.
        plan: what was decided.
        seconds: how long the search took. `tried`: how many candidates were priced.
        notes: what a user should know (methods left out, for instance).
        kinds: heads and hidden units of the model that went in.
    """

    model: CompressedModel
    before: Cost
    cost: Cost
    budget: Budget
    limit: float
    got: float
    plan: Plan
    seconds: float
    tried: int
    notes: list[str] = field(default_factory=list)
    kinds: dict[str, int] = field(default_factory=dict)

    @property
    def ratio(self) -> float:
        """What the result costs as a share of the model that went in (FLOPs or parameters)."""
        if self.budget.quantity == "params":
            return self.cost.params / self.before.params
        return self.cost.flops / self.before.flops

    def __str__(self) -> str:
        rows = "\n".join(f"{name:>12}  {was:>14} -> {now:>14}" for name, was, now in self.table())
        share = self.got / self.limit
        return f"{rows}\nasked {self.budget.asked}, got {share:.4f} of the limit"

    def table(self) -> list[tuple[str, str, str]]:
        """Rows of (quantity, before, after)."""
        after, left = self.cost, _kinds(unwrap(self.model))
        return [
            ("GMACs", f"{self.before.gmacs:.4f}", f"{after.gmacs:.4f}"),
            ("parameters", f"{self.before.params:,}", f"{after.params:,}"),
            ("bytes", f"{self.before.bytes:,}", f"{after.bytes:,}"),
            *[(kind, str(count), str(left[kind])) for kind, count in self.kinds.items()],
        ]

    def summary(self) -> dict[str, Any]:
        """Asked and got, as plain JSON."""
        return {
            "quantity": self.budget.quantity,
            "asked": self.budget.asked,
            "limit": self.limit,
            "got": self.got,
            "share_of_limit": self.got / self.limit,
            "before": self.before.to_json(),
            "after": self.cost.to_json(),
            "seconds": self.seconds,
            "tried": self.tried,
            "notes": self.notes,
        }

    def save_pretrained(self, folder: str | Path, *, overwrite: bool = False) -> None:
        """Save the model, and prove the budget on what was saved.

        Raises:
            OutputExists, CannotWrite: see `CompressedModel.save_pretrained`.
            BudgetUnreachable: the reloaded model does not cost what was counted.
        """
        self.model.save_pretrained(folder, overwrite=overwrite)
        if self.budget.quantity == "latency_ms" or self.model.history.source is None:
            return
        again = measure(load(folder))
        if (again.flops, again.params) != (self.cost.flops, self.cost.params):
            raise BudgetUnreachable(
                f"{folder} reloads as {again}, but {self.cost} was counted before saving."
            )


def compress(
    model: nn.Module,
    *,
    target_flops: str | float | None = None,
    target_params: str | float | None = None,
    target_latency_ms: str | float | None = None,
    methods: str | Method | Sequence[str | Method] | None = None,
    data: Any = None,
    image_size: tuple[int, int] | int | None = None,
    batch_size: int = 1,
) -> Result:
    """Make a model physically smaller and faster, to a budget.

    Args:
        model: a backbone, wrapped or plain; adapters are merged first. It is not changed.
        target_flops: at most this: a ratio in (0, 1], or FLOPs such as ``1.8G`` or ``0.9GMACs``.
        target_params: a ratio or a count such as ``9M``.
        target_latency_ms: milliseconds per batch of `batch_size`, on the device the model is on.
        methods: names, presets or Method objects; by default the preset "balanced".
        data: (images, labels) batches for methods that decide by data.
        image_size: for models that do not say theirs.

    Returns:
        A model in (0.98, 1.00] of the budget.

    Raises:
        BadBudget: the budget cannot be read, or not exactly one was given.
        BudgetUnreachable: no plan of these methods lies in the band; with the nearest figures.
        UnsupportedSite: a method named cannot act on this backbone.
    """
    start = time.perf_counter()
    budget = parse_one(target_flops, target_params, target_latency_ms)
    base, history = _without_adapters(model)
    evidence, explicit = Evidence(data), methods is not None
    chosen, notes = _usable(base, _resolve(methods), budget.quantity, evidence, explicit=explicit)
    before = measure(base, image_size)
    history.before = history.before or before.to_json()
    history.fingerprint = history.fingerprint or fingerprint(base)
    pricing = Pricing(base, chosen, budget.quantity, image_size, batch_size)
    limit = budget.limit(pricing.base_cost(before))
    built = _find(base, chosen, evidence, pricing, budget, before)
    history = history.then(*built.steps)
    return Result(
        model=CompressedModel(built.model, history),
        before=before,
        cost=built.cost,
        budget=budget,
        limit=limit,
        got=built.got,
        plan=history.plan,
        seconds=time.perf_counter() - start,
        tried=built.found.tried,
        notes=notes,
        kinds=_kinds(base),
    )


@dataclass(frozen=True)
class _Built:
    model: nn.Module
    steps: list[Step]
    found: Found
    cost: Cost
    got: float


ATTEMPTS = 4


def _find(
    base: nn.Module,
    methods: Sequence[Method],
    evidence: Evidence,
    pricing: Pricing,
    budget: Budget,
    before: Cost,
) -> _Built:
    """Search, build, and take the cost again on what was built.

    A counted cost is right at once. A timed one is aimed again by what the second timing said.
    """
    limit = aim = budget.limit(pricing.base_cost(before))
    decide, timed = _decider(base, methods, evidence), budget.quantity == "latency_ms"
    tried = 0
    for _ in range(ATTEMPTS if timed else 1):
        found = search(decide, pricing, aim, exact=not timed)
        tried += found.tried
        _require(found, budget, limit, pricing.base_cost(before), methods, timed=timed)
        smaller = copy.deepcopy(base)
        steps = apply_steps(smaller, methods, found)
        cost = measure(smaller, pricing.size[1:])
        got = pricing.again(smaller, cost)
        if in_band(got, limit):
            return _Built(smaller, steps, replace(found, tried=tried), cost, got)
        aim *= 0.99 * limit / got
    spoken = _message(budget, limit, pricing.base_cost(before), replace(found, cost=got), methods)
    raise BudgetUnreachable(spoken)


def apply_steps(model: nn.Module, methods: Sequence[Method], found: Found) -> list[Step]:
    """Apply what was found, in place; the steps for the plan."""
    apply_all(model, methods, found.decisions)
    return [
        Step(name_of(method), method.settings(), found.strength, decisions)
        for method, decisions in zip(methods, found.decisions, strict=True)
        if decisions
    ]


def _decider(base: nn.Module, methods: Sequence[Method], evidence: Evidence) -> Any:
    backbone = view(base)

    def decide(strength: float) -> list[Decisions]:
        with torch.no_grad():
            return [method.decide(backbone, strength, evidence) for method in methods]

    return decide


def _without_adapters(model: nn.Module) -> tuple[nn.Module, History]:
    """The plain model with adapters folded in, and what was done to it besides."""
    history = History.of(model)
    if not is_adapted(model):
        return unwrap(model), history
    merged = merge(model)
    own = getattr(merged, "history", None)
    return unwrap(merged), own if isinstance(own, History) else history.without_adapters()


def _resolve(methods: str | Method | Sequence[str | Method] | None) -> list[Method]:
    given = DEFAULT if methods is None else methods
    listed = [given] if isinstance(given, str | Method) else list(given)
    if not listed:
        raise BadSetting("methods is empty; name at least one.")
    found: list[Method] = []
    for entry in listed:
        found += (
            [entry]
            if isinstance(entry, Method)
            else [make(n, settings) for n, settings in expand(entry)]
        )
    return sorted(found, key=lambda method: method.stage)


def _usable(
    base: nn.Module,
    methods: list[Method],
    quantity: Quantity,
    evidence: Evidence,
    *,
    explicit: bool,
) -> tuple[list[Method], list[str]]:
    """The methods that can act here and help; by default others are left out with a note."""
    backbone, kept, notes = view(base), [], []
    for method in methods:
        name = name_of(method)
        if isinstance(method, Adapter) or quantity not in method.reduces:
            notes.append(f"{name} was left out: it does not reduce {quantity}.")
            continue
        try:
            method.decide(backbone, method.strength or 0.5, evidence)
        except UnsupportedSite as error:
            if explicit:
                raise
            notes.append(f"{name} was left out: {error}")
            continue
        kept.append(method)
    if not kept:
        raise UnsupportedSite("No method can act on this model. " + " ".join(notes))
    return kept, notes


def _require(
    found: Found,
    budget: Budget,
    limit: float,
    base: float,
    methods: Sequence[Method],
    *,
    timed: bool,
) -> None:
    if timed and found.cost <= limit and found.strength > 0:
        return
    if not in_band(found.cost, limit) and not (found.strength == 0.0 and budget.relative):
        raise BudgetUnreachable(_message(budget, limit, base, found, methods))


def _message(
    budget: Budget, limit: float, base: float, found: Found, methods: Sequence[Method]
) -> str:
    names = ", ".join(name_of(method) for method in methods)
    say = _speaker(budget, base)
    asked = f"{budget.quantity} of at most {say(limit)} was asked (target {budget.asked})"
    if found.smallest > limit:
        return (
            f"{asked}; the smallest that {names} can reach on this model is {say(found.smallest)}."
        )
    if found.strength == 0.0:
        return f"{asked}; the model meets it as it is, at {say(found.cost)}. Nothing was removed."
    return (
        f"{asked}; with {names} the nearest below is {say(found.cost)}, which is under 98 % of it: "
        f"the steps are too coarse. Add a method that acts on finer sites; the smallest reachable "
        f"is {say(found.smallest)}."
    )


def _speaker(budget: Budget, base: float) -> Any:
    def say(value: float) -> str:
        if budget.quantity == "latency_ms":
            return f"{value:.3f} ms"
        if budget.quantity == "params":
            return f"{value / 1e6:.4f} M ({value / base:.4f} of the model)"
        return f"{value / 2e9:.4f} GMACs ({value / base:.4f} of the model)"

    return say


def _kinds(model: nn.Module) -> dict[str, int]:
    """How many heads and hidden units there are, where they are told apart."""
    backbone = view(model)
    counts = {
        "heads": sum(site.count for site in backbone.heads),
        "hidden": sum(site.count for site in backbone.hidden),
    }
    return {kind: count for kind, count in counts.items() if count}
