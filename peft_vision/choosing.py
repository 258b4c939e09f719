"""Which methods `compress` uses: those named, those that can act here, and the exact ones first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from torch import nn

from peft_vision.backbones import view
from peft_vision.backbones.sites import Backbone
from peft_vision.budget import Quantity
from peft_vision.errors import BadSetting, UnsupportedSite
from peft_vision.method import Adapter, Evidence, Method, Stage, make, name_of
from peft_vision.mixing import Mix
from peft_vision.plan import Decisions
from peft_vision.presets import expand

DEFAULT, MORE, EXACT = "balanced", "factors", "exact"
"""Presets: what is taken where nothing is named; what is added where that is not enough; and what
is always taken first."""


@dataclass(frozen=True)
class Chosen:
    """Methods in the order in which they act.

    Attributes:
        evidence: what each may look at when it decides.
        mix: how strongly each acts at a common strength; exact ones always act in full.
        notes: what was left out, and why.
    """

    methods: list[Method]
    evidence: list[Evidence]
    mix: Mix = ()
    notes: list[str] = field(default_factory=list)

    @property
    def spending(self) -> list[int]:
        """Places of the methods that cost accuracy."""
        return [i for i, m in enumerate(self.methods) if m.stage != Stage.EXACT]

    def mixed(self, mix: Mix) -> Chosen:
        """The same methods in other proportions: one for each that costs accuracy."""
        whole = [1.0] * len(self.methods)
        for place, weight in zip(self.spending, mix, strict=True):
            whole[place] = weight
        return replace(self, mix=tuple(whole))

    def without_exact(self) -> Chosen:
        """Only those that cost accuracy, for a budget between the two."""
        kept = self.spending
        return replace(
            self,
            methods=[self.methods[i] for i in kept],
            evidence=[self.evidence[i] for i in kept],
            mix=tuple(self.mix[i] for i in kept),
        )

    def decide(self, backbone: Backbone, strength: float) -> list[Decisions]:
        """What each method decides at a common strength in [0, 1]."""
        return [
            method.decide(backbone, self._strength(place, strength), self.evidence[place])
            for place, method in enumerate(self.methods)
        ]

    def _strength(self, place: int, strength: float) -> float:
        if self.methods[place].stage == Stage.EXACT:
            return float(strength > 0)
        # Relative to the strongest, so that every method reaches full strength at 1.
        highest = max(self.mix[i] for i in self.spending)
        share = self.mix[place] / highest
        return strength ** (1 / share) if share < 1 else strength


def choose(
    base: nn.Module,
    asked: str | Method | Sequence[str | Method],
    quantity: Quantity,
    evidence: Evidence,
    *,
    explicit: bool = True,
) -> Chosen:
    """The methods asked for that help with the budget, and exact ones before them.

    Args:
        explicit: a user named them; else those that cannot act here are left out with a note.

    Raises:
        UnknownName, BadSetting: a name or a setting does not exist.
        UnsupportedSite: a method that was named cannot act on this model, or none can.
    """
    kept, notes = _usable(base, _resolve(asked), quantity, evidence, explicit=explicit)
    if not kept:
        raise UnsupportedSite("No method can act on this model. " + " ".join(notes))
    exact = [m for m in _resolve(EXACT) if not any(type(m) is type(other) for other in kept)]
    first, _ = _usable(base, exact, quantity, evidence, explicit=False)
    methods = sorted([*first, *kept], key=lambda method: method.stage)
    chosen = Chosen(methods, [replace(evidence) for _ in methods], notes=notes)
    return chosen.mixed((1.0,) * len(chosen.spending))


def _resolve(methods: str | Method | Sequence[str | Method]) -> list[Method]:
    listed = [methods] if isinstance(methods, str | Method) else list(methods)
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
    return kept, notes
