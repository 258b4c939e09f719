"""What was done to a model: where it came from, the plan, and what is known of the result."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from peft_vision.method import Adapter, Method, find, make
from peft_vision.plan import Plan, Step
from peft_vision.sources import Spec, spec_of

SAMPLE = 4096


@dataclass
class History:
    """The record that travels with a wrapped or compressed model and is saved with it.

    Attributes:
        source: how to build the base architecture again; None when only the user can.
        plan: every step since.
        merged: of how many of the first steps the adapters were folded into the weights; those that
            are left in the plan are parts of the model now.
        fingerprint: of the base's weights, to refuse a wrong base.
        before: cost of the base, as JSON.
        metrics: name -> figure or record, e.g. ``{"top1": {"value": 0.91, "n": 556}}``.
        labels: class names in the order of the outputs.
        preprocessing: how images are prepared (mean, std, size, interpolation, crop_pct).
        task: what the model was made for and the settings that belong to it, as JSON with a
            ``name``; None for one image in, one answer out.
    """

    source: Spec | None = None
    plan: Plan = field(default_factory=Plan)
    merged: int = 0
    fingerprint: str | None = None
    before: dict[str, Any] | None = None
    metrics: dict[str, Any] = field(default_factory=dict)
    labels: list[str] | None = None
    preprocessing: dict[str, Any] | None = None
    task: dict[str, Any] | None = None

    @classmethod
    def of(cls, model: nn.Module) -> History:
        """The history of a model: its own if it has one, else a fresh one of a plain model."""
        own = getattr(model, "history", None)
        return replace(own) if isinstance(own, History) else cls(source=spec_of(model))

    @classmethod
    def of_record(cls, content: Mapping[str, Any]) -> History:
        """The history that a folder's record tells."""
        return cls(
            source=content.get("source"),
            plan=Plan.from_json(content.get("plan") or {}),
            merged=int(content.get("merged") or 0),
            fingerprint=content.get("fingerprint"),
            before=(content.get("cost") or {}).get("before"),
            metrics=dict(content.get("metrics") or {}),
            labels=content.get("labels"),
            preprocessing=content.get("preprocessing"),
            task=content.get("task"),
        )

    @property
    def changed_structure(self) -> bool:
        """Whether the base's weights can no longer be had from where the base came from."""
        return self.merged > 0 or any(not method.derived for method in self._methods())

    @property
    def quantized(self) -> bool:
        """Whether a step stored the base's weights in fewer bits."""
        return any(m.derived and not issubclass(m, Adapter) for m in self._methods())

    @property
    def adapters(self) -> list[tuple[Adapter, Step]]:
        """The adapters that are in place, with their steps; merged ones are not adapters now."""
        steps = self.plan.steps[self.merged :]
        made = [(make(step.method, dict(step.settings)), step) for step in steps]
        return [(method, step) for method, step in made if isinstance(method, Adapter)]

    def without_adapters(self) -> History:
        """This history without its adapters."""
        return self._only(lambda method: not issubclass(method, Adapter))

    def in_full_precision(self) -> History:
        """This history without what stored weights in fewer bits."""
        return self._only(lambda method: issubclass(method, Adapter) or not method.derived)

    def _only(self, wanted: Callable[[type[Method]], bool]) -> History:
        """This history with the steps of some methods; what is merged stays in any case."""
        kept = tuple(
            step
            for number, step in enumerate(self.plan.steps)
            if number < self.merged or wanted(find(step.method))
        )
        return replace(self, plan=Plan(kept))

    def then(self, *steps: Step) -> History:
        """This history with further steps. What was measured before them holds no more."""
        return replace(self, plan=self.plan.then(*steps), metrics={})

    def _methods(self) -> list[type[Method]]:
        return [find(step.method) for step in self.plan.steps]


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
