"""A method of PEFT's on targets taken from sites."""

from __future__ import annotations

import dataclasses
import typing
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import peft

from peft_vision.adapters._explained_variance import FIELD, directions, patterns, put, ranks
from peft_vision.adapters._fit import fitted
from peft_vision.adapters._norms import norm_paths, norms_in, prefers_norms
from peft_vision.adapters._origin import Origin, defaults_of, origin_of, settings_of
from peft_vision.adapters._refusals import reason_against, refuse
from peft_vision.adapters._targets import check_targets, chosen_layers, exactly, split_paths
from peft_vision.backbones.sites import Backbone
from peft_vision.errors import BadSetting, MissingExtra
from peft_vision.method import Adapter, Evidence, Need
from peft_vision.plan import Decisions

__all__ = ["FITTED", "Offered", "defaults_of", "needs_of", "origin_of", "settings_of"]
FITTED = "fitted"
"""Key in a field's metadata of the default that PEFT has where ours is None: it, or what fits."""
LONG = 1_000_000
"""Steps of a run whose length PEFT asks for before there is a run; training sets the real one."""
NORMS = "norms"
"""The key of a decision about all normalization layers at once."""


@dataclass(frozen=True)
class Offered(Adapter):
    """Base of the methods that are found in PEFT; their further fields are PEFT's settings."""

    origin: ClassVar[Origin]

    targets: tuple[str, ...] = ("linears",)
    """Which layers: "linears" (all but the classifier), "convs" (ungrouped ones), "attention",
    "mlp", or roles (q, k, v, qkv, out, up, gate, down)."""

    train_head: bool = True
    """Train the classifier in full and save it with the adapter."""

    def __post_init__(self) -> None:
        check_targets(self.targets)
        for name, (hint, _) in settings_of(self.origin).items():
            _check(name, getattr(self, name), hint)
        if not reason_against(self.origin):
            self._made({}, [], [], [])

    def decide(self, backbone: Backbone, strength: float, evidence: Evidence) -> Decisions:
        """Per layer, the numbers that had to be fitted to it; the classifier's key if trained."""
        if strength <= 0:
            return {}
        refuse(self.origin)
        if prefers_norms(self.origin):
            keys, layers = [NORMS], norms_in(backbone)
        else:
            sites = chosen_layers(backbone, self.targets)
            keys, layers = [site.key for site in sites], [site.layer for site in sites]
        numbers = fitted(self.origin.name, layers, self._trial, self._free())
        decisions: Decisions = {key: dict(numbers) for key in keys}
        if self._learns:
            config = self._made(numbers, split_paths(backbone, keys)[0], [], [])
            decisions = ranks(directions(backbone, sites, config, evidence), config)
        if self.train_head:
            decisions.update({site.key: "train" for site in backbone.classifier})
        return decisions

    def learn(self, backbone: Backbone, decisions: Decisions, evidence: Evidence) -> None:
        """First values that follow from the data that `decide` saw."""
        if self._learns:
            put(backbone, evidence.memory[FIELD])

    def config(self, backbone: Backbone, decisions: Decisions) -> peft.PeftConfig:
        """PEFT's configuration; PEFT folders written with it load in plain PEFT."""
        keys = [key for key in decisions if key != NORMS]
        layers, heads = split_paths(backbone, keys)
        own = dict(zip((k for k in keys if decisions[k] != "train"), layers, strict=True))
        if NORMS in decisions:
            layers = norm_paths(backbone)
        numbers: Any = next((v for v in decisions.values() if isinstance(v, dict)), {})
        fit = {key: value for key, value in numbers.items() if key in settings_of(self.origin)}
        made = self._made(fit, layers, heads, _second_linears(backbone, decisions))
        made.target_modules = exactly(backbone, layers)
        for field, pattern in patterns(own, decisions).items():
            setattr(made, field, pattern)
        return made

    @property
    def _learns(self) -> bool:
        return self.needs is Need.DATA

    def _trial(self, numbers: Mapping[str, int], names: list[str]) -> peft.PeftConfig:
        return self._made(numbers, names, [], [])

    def _made(
        self,
        numbers: Mapping[str, Any],
        layers: Sequence[str],
        heads: Sequence[str],
        second: Sequence[str],
    ) -> peft.PeftConfig:
        given = {**self._given(), **numbers, **self.origin.fixed}
        known = self.origin.fields
        filled = {
            "target_modules": list(layers),
            "modules_to_save": list(heads) or None,
            "feedforward_modules": list(second),
            "progressbar": False,
            "total_step": given.get("total_step", LONG),
        }
        inside = {name: given.pop(name) for name in list(given) if name not in known}
        given |= {name: value for name, value in filled.items() if name in known}
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about fields that are left at their defaults
                if self.origin.nested is not None:
                    place, cls = self.origin.nested
                    given[place] = cls(**inside, **_filled(cls, layers, second))
                return self.origin.config(**given)
        except (ValueError, TypeError) as error:
            raise BadSetting(f"{self.origin.name}: {error}") from error
        except ImportError as error:
            raise MissingExtra(f"{self.origin.name}: {error}") from error

    def _given(self) -> dict[str, Any]:
        settings = {name: getattr(self, name) for name in settings_of(self.origin)}
        return {name: value for name, value in settings.items() if value is not None}

    def _free(self) -> dict[str, int]:
        """Whole numbers that the user left to PEFT."""
        defaults = defaults_of(self.origin)
        names = set(settings_of(self.origin)) - set(self._given())
        return {n: defaults[n] for n in names if isinstance(defaults[n], int)}


def needs_of(origin: Origin) -> Need:
    """What a method needs in order to decide."""
    return Need.DATA if origin.nested and origin.nested[0] == FIELD else Need.NOTHING


def _filled(cls: type[Any], layers: Sequence[str], second: Sequence[str]) -> dict[str, Any]:
    """What a variant's own configuration says of layers."""
    filled = {
        "target_modules_bd_a": list(second),
        "target_modules_bd_b": [name for name in layers if name not in second],
    }
    return {f.name: filled[f.name] for f in dataclasses.fields(cls) if f.name in filled}


def _second_linears(backbone: Backbone, decisions: Decisions) -> list[str]:
    """Those that end a branch of a block: methods that scale activations do so at their input."""
    ends = [s.key for s in backbone.linears if s.role in ("out", "down") and s.key in decisions]
    return split_paths(backbone, ends)[0]


def _check(name: str, value: Any, hint: Any) -> None:
    members = [hint, *typing.get_args(hint)]
    choices = [c for m in members if typing.get_origin(m) is Literal for c in typing.get_args(m)]
    if value is None or not choices or (bool in members and isinstance(value, bool)):
        return
    if value not in choices:
        raise BadSetting(f"{name} is {value!r}; possible: {', '.join(map(repr, choices))}.")
