"""What was done to a model: where it came from, the plan, and what is known of the result."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from peft_vision.method import Adapter, find
from peft_vision.plan import Plan, Step
from peft_vision.sources import Spec, spec_of

SAMPLE = 4096


@dataclass
class History:
    """The record that travels with a wrapped or compressed model and is saved with it.

    Attributes:
        source: how to build the base architecture again; None when only the user can.
        plan: every step since.
        fingerprint: of the base's weights, to refuse a wrong base.
        before: cost of the base, as JSON.
        metrics: name -> figure or record, e.g. ``{"top1": {"value": 0.91, "n": 556}}``.
        labels: class names in the order of the outputs.
        preprocessing: how images are prepared (mean, std, size, interpolation, crop_pct).
    """

    source: Spec | None = None
    plan: Plan = field(default_factory=Plan)
    fingerprint: str | None = None
    before: dict[str, Any] | None = None
    metrics: dict[str, Any] = field(default_factory=dict)
    labels: list[str] | None = None
    preprocessing: dict[str, Any] | None = None

    @classmethod
    def of(cls, model: nn.Module) -> History:
        """The history of a model: its own if it has one, else a fresh one of a plain model."""
        own = getattr(model, "history", None)
        return replace(own) if isinstance(own, History) else cls(source=spec_of(model))

    @property
    def changed_structure(self) -> bool:
        """Whether any step changed the base itself, rather than adding adapters to it."""
        return any(not issubclass(find(step.method), Adapter) for step in self.plan.steps)

    def without_adapters(self) -> History:
        """This history once the adapters have been folded into the weights."""
        kept = tuple(s for s in self.plan.steps if not issubclass(find(s.method), Adapter))
        return replace(self, plan=Plan(kept))

    def then(self, *steps: Step) -> History:
        """This history with further steps. What was measured before them holds no more."""
        return replace(self, plan=self.plan.then(*steps), metrics={})


def fingerprint(model: nn.Module, skip: Iterable[nn.Module] = ()) -> str:
    """Recognizes weights: names, shapes and up to 4,096 evenly spaced values of every parameter.

    Args:
        model: the base.
        skip: modules that do not count (a classifier that will be replaced).
    """
    skipped = {id(p) for module in skip for p in module.parameters()}
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        if id(parameter) in skipped or parameter.is_meta:
            continue
        flat = parameter.detach().reshape(-1)
        picked = flat[:: max(1, flat.numel() // SAMPLE)].to("cpu", torch.float32)
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        digest.update(picked.numpy().tobytes())
    return digest.hexdigest()
