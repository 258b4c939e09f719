"""Variational information bottleneck: gates with noise learn what a model can do without.

VIBNet (Dai et al., ICML 2018), VTrans and TVA-Prune (Dutta et al., 2024): the width of the stream,
heads, hidden units and whole branches get a noisy factor each. What the task does not defend drowns
in its noise and is removed physically; the means of the rest are folded into the weights.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from peft_vision.backbones.sites import Backbone
from peft_vision.errors import BadSetting, UnsupportedSite
from peft_vision.layers.gate_control import Term, controller_in
from peft_vision.layers.votes import Half
from peft_vision.method import Evidence, Stage, Trained, check_range
from peft_vision.plan import Decisions, pack_indices, unpack_indices
from peft_vision.pruners._gating import (
    BRANCHES,
    WIDTH,
    Places,
    kind_of,
    put_gates,
    require,
    take_gates,
    terms_of,
)
from peft_vision.pruners._path_cuts import remove

GATES = "gates"
GONE = "absent"
TOLERANCE = 0.02
"""How far from the target, as a share of the whole cost, the gates may end without a note."""


@dataclass(frozen=True)
class Vib(Trained):
    """Train a noisy factor for every feature, head, unit and branch; remove what drowns in noise.

    A gate's log alpha = log(variance / mean^2) says how little a unit is worth; from 0 on it is
    worth nothing. `wrap` puts the gates in and leaves training to you; `compress` trains them.
    """

    target: float = 0.5
    """Share of the multiply-accumulates that gates put in by `wrap` train towards, in (0, 1]."""

    train: Literal["masks", "fast", "full"] = "masks"
    """Train the gates alone, gates and weights on a part of the data, or both on all of it."""

    width: bool = True
    """Gates on the width of the residual stream, one set for the whole model."""

    heads: bool = True
    """Gates on attention heads."""

    hidden: bool = True
    """Gates on MLP hidden units."""

    branches: bool = True
    """Gates on whole attention and MLP branches, where the model's blocks can do without one."""

    multiple: int = 8
    """Features and hidden units leave in groups of this many (1 to 256), for fast kernels."""

    kl: float = 1e-6
    """Weight of what the gates let through in the loss, in [0, 1]."""

    width_weight: float = 30.0
    """Times the KL of features of the stream, in [0, 1e6]."""

    heads_weight: float = 256.0
    """Times the KL of heads, in [0, 1e6]."""

    hidden_weight: float = 1.0
    """Times the KL of hidden units, in [0, 1e6]."""

    branch_weight: float = 256.0
    """Times the KL of branches, in [0, 1e6]."""

    speed: float = 100.0
    """How many times faster than weights gates learn, in [1, 1e4]: 0.05 where weights have 5e-4.
    `compress` gives gates this many times 1e-3, whatever the weights have."""

    weight_rate: float = 5e-5
    """Learning rate in `compress` of weights, where they are trained, too, in [1e-8, 1e-2]: they
    are good already, and the gates' 1e-3 times `speed` would undo them."""

    steps: int = 400
    """Training steps that are planned (1 to 1e9); gates need about a hundred to get anywhere."""

    ramp: float = 0.2
    """Share of the steps over which the target is lowered from 1, in [0, 1]."""

    share: float = 0.03
    """Share of the images that "fast" trains on, in (0, 1]."""

    stage: ClassVar[Stage] = Stage.WIDTH
    reduces: ClassVar[frozenset[str]] = frozenset({"flops", "params", "latency_ms"})

    def __post_init__(self) -> None:
        check_range("target", self.target, 1e-3, 1.0)
        check_range("share", self.share, 1e-6, 1.0)
        check_range("ramp", self.ramp, 0.0, 1.0)
        check_range("kl", self.kl, 0.0, 1.0)
        check_range("speed", self.speed, 1.0, 1e4)
        check_range("weight_rate", self.weight_rate, 1e-8, 1e-2)
        check_range("multiple", self.multiple, 1, 256)
        check_range("steps", self.steps, 1, 10**9)
        for name in ("width_weight", "heads_weight", "hidden_weight", "branch_weight"):
            check_range(name, getattr(self, name), 0.0, 1e6)
        if self.train not in ("masks", "fast", "full"):
            raise BadSetting(f"train is {self.train!r}; possible: masks, fast, full.")
        if not (self.width or self.heads or self.hidden or self.branches):
            raise BadSetting("Nothing is gated. Set one of width, heads, hidden, branches.")

    @property
    def data_share(self) -> float | None:
        """Share of the training images that are used with their labels.

        None: as many as the steps take; gates alone learn from the dense model, without labels.
        """
        return {"masks": None, "fast": self.share, "full": 1.0}[self.train]

    def attach(self, backbone: Backbone, target: float) -> None:
        """Put in the gates and what holds them to the target."""
        require(backbone, self._places)
        weights = {
            WIDTH: self.width_weight,
            "heads": self.heads_weight,
            "hidden": self.hidden_weight,
            **dict.fromkeys(BRANCHES, self.branch_weight),
        }
        put_gates(
            backbone,
            self._places,
            target=target,
            speed=self.speed,
            weights={kind: self.kl * weight for kind, weight in weights.items()},
            ramp=(self.ramp, int(self.steps)),
            freeze=self.train == "masks",
        )

    def settle(self, backbone: Backbone) -> dict[str, Any] | None:
        """Fold the gates' means into the weights.

        Returns:
            ``log_alpha`` per gate; ``target``, the share that was aimed at; ``expected``, the share
            that the gates expect to be left; ``strength``, at which `decide` removes what is worth
            nothing; and ``notes`` for a user.
        """
        control = take_gates(backbone.model)
        if control is None:
            return None
        with torch.no_grad():
            alphas = {key: gate.log_alpha().tolist() for key, gate in control.gates.items()}
            expected = float(control.expected())
        learned = {"log_alpha": alphas, "target": control.target, "expected": expected}
        pieces = _ranked(self._pieces(backbone, alphas, control.terms))
        worthless = sum(piece.macs for piece in pieces if piece.score >= 0)
        whole = sum(piece.macs for piece in pieces)
        notes = []
        if abs(expected - control.target) > TOLERANCE:
            notes.append(
                f"The gates expect {expected:.3f} of the cost to be left, {control.target:.3f} was "
                "aimed at; what is removed is ranked by gates that have not settled. More steps, "
                "or a higher speed, bring them nearer."
            )
        return {**learned, "strength": worthless / max(whole, 1e-30), "notes": notes}

    def decide(self, backbone: Backbone, strength: float, evidence: Evidence) -> Decisions:
        """Per site what stays, from what was learned; before that, that gates are put in.

        Strength is a share of what all units together save, least worthy ones first.
        """
        learned = evidence.learned
        if learned is None:
            require(backbone, self._places)
            gated = controller_in(backbone.model) is not None
            return {} if strength <= 0 or gated else {GATES: {"target": self.target}}
        alphas: Mapping[str, list[float]] = learned["log_alpha"]
        terms = evidence.once(("gates", "terms"), lambda: terms_of(backbone))
        pieces = _ranked(self._pieces(backbone, alphas, terms))
        gone = _gone(pieces, strength)
        return {
            key: GONE
            if kind_of(key) in BRANCHES
            else pack_indices([i for i in range(len(values)) if i not in gone[key]], of=len(values))
            for key, values in alphas.items()
            if key in gone
        }

    def apply(self, backbone: Backbone, decisions: Decisions) -> None:
        """Put gates in, or cut what goes; branches last, so that sites keep their places."""
        for key, decision in decisions.items():
            if key == GATES:
                self.attach(backbone, float(decision["target"]))  # type: ignore[index, call-overload, arg-type]
        sites = _sites(backbone)
        for key, decision in decisions.items():
            if key != GATES and decision != GONE:
                sites[key].keep(unpack_indices(decision))
        for key, decision in decisions.items():
            if decision == GONE:
                _remove(backbone, key)

    @property
    def _places(self) -> Places:
        return Places(self.width, self.heads, self.hidden, self.branches)

    def _pieces(
        self, backbone: Backbone, alphas: Mapping[str, list[float]], terms: list[Term]
    ) -> list[_Piece]:
        """Everything that may leave, in pieces of `multiple` units.

        The first one is what a site has beyond a multiple of them. One piece of a site stays, and
        so do the worthiest attention and the worthiest MLP.
        """
        _check(backbone, alphas)
        found, stay = [], _worthiest(alphas)
        for key, values in alphas.items():
            each = sum(term.macs for term in terms if key in term.gates) / len(values)
            group = int(self.multiple) if kind_of(key) in (WIDTH, "hidden") else 1
            order = sorted(range(len(values)), key=lambda i: (-values[i], i))
            starts = [0, *range(len(order) % group or group, len(order), group), len(order)]
            parts = [order[start:end] for start, end in itertools.pairwise(starts)]
            leaving = parts if kind_of(key) in BRANCHES and key not in stay else parts[:-1]
            found += [
                _Piece(sum(values[i] for i in part) / len(part), key, tuple(part), each * len(part))
                for part in leaving
            ]
        return found


@dataclass(frozen=True)
class _Piece:
    """Units of one gate that leave together: their mean log alpha, and what they save alone."""

    score: float
    key: str
    units: tuple[int, ...]
    macs: float


def _worthiest(alphas: Mapping[str, list[float]]) -> set[str]:
    """The branches that a model is not left without, one of each kind."""
    kinds = [[key for key in alphas if kind_of(key) == half] for half in BRANCHES]
    return {min(keys, key=lambda key: alphas[key][0]) for keys in kinds if keys}


def _ranked(pieces: list[_Piece]) -> list[_Piece]:
    """Least worthy first; pieces of one site keep their order."""
    return sorted(pieces, key=lambda piece: -piece.score)


def _gone(ranked: list[_Piece], strength: float) -> dict[str, set[int]]:
    """What leaves, per gate: the first pieces that together save `strength` of what all save.

    What leaves at one strength leaves at every higher one, so that cost never rises with strength.
    """
    whole, saved = math.fsum(piece.macs for piece in ranked), 0.0
    gone: dict[str, set[int]] = {}
    for piece in ranked:
        saved += piece.macs
        if saved > (strength + 1e-9) * whole:
            break
        gone.setdefault(piece.key, set()).update(piece.units)
    return gone


def _sites(backbone: Backbone) -> dict[str, Any]:
    """What units can be cut at, by key."""
    sites: list[Any] = [*backbone.heads, *backbone.hidden]
    if backbone.width is not None:
        sites.append(backbone.width)
    return {site.key: site for site in sites}


def _check(backbone: Backbone, alphas: Mapping[str, list[float]]) -> None:
    counts = {key: site.count for key, site in _sites(backbone).items()}
    for key, values in alphas.items():
        if kind_of(key) not in BRANCHES and counts.get(key) != len(values):
            raise UnsupportedSite(
                f"Gates were trained on {len(values)} units of {key}, and this model has "
                f"{counts.get(key, 0)} there. Train and remove on the same structure."
            )


def _remove(backbone: Backbone, key: str) -> None:
    """Take a branch out, with its norm and its scale, which nothing would train any more."""
    backbone.require("tokens")
    if backbone.tokens is None:
        return
    _, number, half = key.split(".")
    side: Half = "attention" if half == "attention" else "mlp"
    remove(backbone.tokens.trunk(), (int(number), side), offset=False)
