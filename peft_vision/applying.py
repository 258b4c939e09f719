"""Several methods' decisions on one model, one after the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn

from peft_vision.backbones import view
from peft_vision.backbones.queries import queries_in
from peft_vision.method import Method
from peft_vision.plan import Decisions


def apply_all(
    model: nn.Module, methods: Sequence[Method], decisions: Sequence[Decisions]
) -> list[Decisions]:
    """Apply each method's decisions, in place and in order; what was carried out."""
    return in_order(model, methods, decisions, lambda m, decided: m.apply(view(model), decided))


def in_order(
    model: nn.Module,
    methods: Sequence[Method],
    decisions: Sequence[Decisions],
    carry_out: Callable[[Method, Decisions], None],
) -> list[Decisions]:
    """Carry out decisions that were all made on the whole model, one method after the other.

    A site that an earlier method removed is gone for the later ones; so are their decisions on it.
    """
    gone: set[str] = set()
    carried_out = []
    for method, decided in zip(methods, decisions, strict=True):
        left = {key: decision for key, decision in decided.items() if key not in gone}
        if left:
            before = _sites(model)
            carry_out(method, left)
            gone |= before - _sites(model)
        carried_out.append(left)
    return carried_out


def _sites(model: nn.Module) -> set[str]:
    backbone = view(model)
    members = {site.key for site in backbone.heads} | {site.key for site in backbone.hidden}
    return members | {site.key for site in queries_in(backbone)}
