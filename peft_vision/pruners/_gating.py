"""Where gates stand in a backbone, what passes through them costs, and how they come and go."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from peft_vision.backbones import view
from peft_vision.backbones.sites import Backbone, LayerSite, device_of
from peft_vision.backbones.width import Held
from peft_vision.cost import count_flops, input_size, twin
from peft_vision.errors import UnsupportedSite
from peft_vision.layers.bottleneck import Behind
from peft_vision.layers.gate_control import Controller, Term, controller_in
from peft_vision.layers.gates import Gate, Gated, GatedLinear
from peft_vision.layers.masked_norm import GatedNorm, can_be_gated
from peft_vision.layers.ownership import plain_of, trained_dtype
from peft_vision.layers.quantized import quantized_layers
from peft_vision.layers.train_linear import require_cuttable

WIDTH = "width"
BRANCHES = ("attention", "mlp")

GATES: dict[str, tuple[str, ...]] = {
    "q": (WIDTH, "heads", "attention"),
    "k": (WIDTH, "heads", "attention"),
    "v": (WIDTH, "heads", "attention"),
    "qkv": (WIDTH, "heads", "attention"),
    "other": (WIDTH, "heads", "attention"),
    "out": (WIDTH, "heads", "attention"),
    "gate": (WIDTH, "hidden", "mlp"),
    "up": (WIDTH, "hidden", "mlp"),
    "down": (WIDTH, "hidden", "mlp"),
}
"""Role of a linear in its block -> the kinds of gates whose shares multiply its cost."""


def kind_of(key: str) -> str:
    """Of a gate: "width", "heads", "hidden", "attention" or "mlp"."""
    return key.rpartition(".")[2]


class _Parts(TorchFunctionMode):
    """Notes what is computed with parts of weights, which no call of a layer tells of.

    Attributes:
        macs: id of the whole weight -> multiply-accumulates.
        rows: id of the whole weight -> the most rows at once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.macs: dict[int, float] = defaultdict(float)
        self.rows: dict[int, int] = defaultdict(int)
        self._taken: list[tuple[Tensor, nn.Parameter]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call, and note products with a part of a weight."""
        output = func(*args, **(kwargs or {}))
        if func is Tensor.__getitem__ and isinstance(args[0], nn.Parameter):
            self._taken.append((output, args[0]))
        if func is functional.linear:
            for whole in (whole for part, whole in self._taken if part is args[1]):
                self.macs[id(whole)] += float(output.numel() * args[1].shape[1])
                rows = output.numel() // int(args[1].shape[0])
                self.rows[id(whole)] = max(self.rows[id(whole)], rows)
        return output


@dataclass(frozen=True)
class _Work:
    """What the layers of one image's pass do: id of a layer -> rows, multiply-accumulates."""

    rows: dict[int, int]
    macs: dict[int, float]


def terms_of(backbone: Backbone) -> list[Term]:
    """What the parts of a model cost, and which gates each depends on.

    The rows that each layer is called with are counted on a twin, so that tokens that leave on the
    way, patches, class tokens and heads are all as they are; what is not a linear, a convolution or
    an attention product of a block does not depend on gates.
    """
    meta = twin(backbone.model)
    seen = view(meta)
    seen.call_every_linear()  # one whose weight is read instead would not be seen at work
    work = _Work({}, {})

    def note(layer: Any, given: Any, output: Tensor) -> None:
        sizes = _sizes(layer)
        if sizes is not None:
            work.rows[id(layer)] = output.numel() // sizes[1]
            work.macs[id(layer)] = float(output.numel() * sizes[0])

    watched = (*seen.linears, *seen.convs, *seen.classifier)
    hooks = [site.layer.register_forward_hook(note) for site in watched]
    with _Parts() as parts:
        total = count_flops(meta, input_size(backbone.model)) / 2
    for hook in hooks:
        hook.remove()
    for layer in (site.layer for site in watched if id(site.layer) not in work.rows):
        whole = id(getattr(plain_of(layer), "weight", None))
        if whole in parts.rows:
            work.rows[id(layer)], work.macs[id(layer)] = parts.rows[whole], parts.macs[whole]
    terms = [term for site in watched for term in _of_layer(site, seen, work)]
    terms += _products(seen, work.rows)
    return [*terms, Term(max(total - sum(term.macs for term in terms), 0.0))]


def _sizes(layer: nn.Module) -> tuple[int, int] | None:
    """Multiply-accumulates per output of a linear or a convolution, and how many outputs it has."""
    weight = getattr(plain_of(layer), "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() not in (2, 4):
        return None
    return weight[0].numel(), int(weight.shape[0])


def _of_layer(site: LayerSite, backbone: Backbone, work: _Work) -> Iterator[Term]:
    macs = work.macs.get(id(site.layer))
    if macs is None:
        return
    pooled = backbone.width is not None and bool(backbone.width.pools)
    if site.block is not None:
        kinds = GATES[site.role]
        yield Term(macs, tuple(k if k == WIDTH else f"blocks.{site.block}.{k}" for k in kinds))
        return
    last = any(site.layer is one.layer for one in backbone.classifier) and not pooled
    yield Term(macs, (WIDTH,) if last or site.layer is _patch(backbone) else ())


def _patch(backbone: Backbone) -> nn.Module | None:
    return None if backbone.width is None else getattr(*backbone.width.patch)


def _products(backbone: Backbone, rows: Mapping[int, int]) -> Iterator[Term]:
    """Queries times keys, and weights times values."""
    layers = {(s.block, s.role): s.layer for s in backbone.linears if s.block is not None}
    for (block, role), out in layers.items():
        sizes = _sizes(out)
        keys = layers.get((block, "qkv"), layers.get((block, "k")))
        if role == "out" and sizes is not None and id(out) in rows and id(keys) in rows:
            macs = 2.0 * rows[id(out)] * rows[id(keys)] * sizes[0]
            yield Term(macs, (f"blocks.{block}.heads", f"blocks.{block}.attention"))


@dataclass(frozen=True)
class Places:
    """Where gates are wanted."""

    width: bool
    heads: bool
    hidden: bool
    branches: bool


def require(backbone: Backbone, places: Places) -> None:
    """Refuse by name what cannot be gated.

    Raises:
        UnsupportedSite: a kind of place is missing, or is not one that a gate can stand at.
    """
    wanted = {"heads": places.heads, "hidden": places.hidden, WIDTH: places.width}
    for kind in (kind for kind, on in wanted.items() if on and not getattr(backbone, kind)):
        why = backbone.missing.get(kind, f"the {backbone.family} view finds none")
        raise UnsupportedSite(
            f"{type(backbone.model).__name__} has no {kind} to gate: {why}. Possible: {kind}=False."
        )
    packed = next(quantized_layers(backbone.model), None)
    if packed is not None:
        raise UnsupportedSite(
            f"{packed[0]} holds a packed weight, into which the mean of a gate cannot be folded. "
            "Train gates first, quantize afterwards."
        )
    if places.width or places.heads or places.hidden:  # what is trained now is cut afterwards
        require_cuttable(*backbone.model.modules())
    if places.width and any(isinstance(module, Behind) for module in backbone.model.modules()):
        raise UnsupportedSite(
            f"In {type(backbone.model).__name__} a bottleneck reads what a branch adds to the "
            "stream, with no norm between where a gate could stand. Possible: width=False."
        )
    for owner, name in _norms(backbone, places):
        if reason := can_be_gated(getattr(owner, name)):
            raise UnsupportedSite(f"{type(owner).__name__}.{name} cannot be gated: {reason}.")


def _norms(backbone: Backbone, places: Places) -> list[Held]:
    found: list[Held] = []
    if places.width and backbone.width is not None:
        found += [*_real(backbone.width.norms), *_real(backbone.width.other_norms)]
    for heads in backbone.heads if places.heads else ():
        found += _real([(heads.attention, heads.parts.norm)] if heads.parts.norm else [])
    for hidden in backbone.hidden if places.hidden else ():
        found += _real([(hidden.mlp, hidden.parts.norm)] if hidden.parts.norm else [])
    return [held for held in found if not isinstance(getattr(*held), Gated)]


def _real(places: Any) -> list[Held]:
    """Those where a norm stands, and not a module that gives on what it is given."""
    return [p for p in places if not isinstance(getattr(*p), nn.Identity | None)]


class Putting:
    """Puts gates into a model, one kind after the other."""

    def __init__(self, backbone: Backbone, speed: float) -> None:
        self.backbone = backbone
        self.speed = speed
        self.like = {"device": device_of(backbone.model), "dtype": trained_dtype(backbone.model)}
        self.gates: dict[str, Gate] = {}
        self.shared: Gate | None = None
        self.last: Gated | None = None

    def gate(self, key: str, units: int) -> Gate:
        """A new gate."""
        self.gates[key] = Gate(units, self.speed, **self.like)
        return self.gates[key]

    def on_units(self, places: Places) -> None:
        """Gates on heads, hidden units and whole branches."""
        branches = places.branches and self.backbone.tokens is not None
        for heads in self.backbone.heads:
            unit = self.gate(heads.key, heads.count) if places.heads else None
            branch = self.gate(f"blocks.{heads.block}.attention", 1) if branches else None
            self._before(heads.attention, heads.parts.out, heads.parts.norm, unit, branch)
        for hidden in self.backbone.hidden:
            unit = self.gate(hidden.key, hidden.count) if places.hidden else None
            branch = self.gate(f"blocks.{hidden.block}.mlp", 1) if branches else None
            self._before(hidden.mlp, hidden.parts.down, hidden.parts.norm, unit, branch)

    def _before(
        self, owner: nn.Module, name: str, norm: str | None, unit: Gate | None, branch: Gate | None
    ) -> None:
        """Units are gated where their consumer reads them, or behind the norm over them."""
        if unit is not None and norm is not None and _real([(owner, norm)]):
            self._put((owner, norm), GatedNorm(getattr(owner, norm), unit, shared=False))
            unit = None
        if unit is not None or branch is not None:
            self._put((owner, name), GatedLinear(getattr(owner, name), unit, branch))

    def on_width(self) -> None:
        """One gate on the stream, at every norm through which something reads it."""
        site = self.backbone.width
        if site is None:
            raise AssertionError("require() comes first")
        self.shared = self.gate(WIDTH, site.count)
        for draws, places in ((False, (*site.other_norms, *site.held_norms)), (True, site.norms)):
            for held in _real(places):
                norm = getattr(*held)
                self._put(held, GatedNorm(norm, self.shared, shared=True, draws=draws))

    def _put(self, held: Held, gated: Gated) -> None:
        setattr(*held, gated)
        self.last = gated


def put_gates(
    backbone: Backbone,
    places: Places,
    *,
    target: float,
    speed: float,
    weights: Mapping[str, float],
    ramp: tuple[float, int],
    freeze: bool,
) -> None:
    """Put gates and their controller into a model, in place.

    Args:
        weights: kind of gate -> what its KL is multiplied by.
        ramp: the share of the steps over which the target is lowered, and their number.
        freeze: train gates alone.
    """
    terms, model = terms_of(backbone), backbone.model
    thawed = [name for name, p in model.named_parameters() if p.requires_grad]
    putting = Putting(backbone, speed)
    putting.on_units(places)
    if places.width:
        putting.on_width()
    if putting.last is None:
        return
    priced = {key: weights[kind_of(key)] for key in putting.gates}
    control = Controller(
        putting.gates, putting.shared, priced, terms, target, speed, **putting.like
    )
    control.thawed, control.ramp_share = thawed, ramp[0]
    control.plan(ramp[1])
    putting.last.host = control.train(model.training)
    if freeze:
        model.requires_grad_(False)
        for own in (*putting.gates.values(), control):
            own.requires_grad_(True)


def take_gates(model: nn.Module) -> Controller | None:
    """Take all gates out, in place; their means are in the weights then.

    Returns:
        The controller, which knows what the gates have learned; None where there are no gates.

    Raises:
        UnsupportedSite: a mean cannot be folded into a layer; nothing is changed then.
    """
    control = controller_in(model)
    if control is None:
        return None
    held = [
        (owner, name, child)
        for owner in model.modules()
        for name, child in owner.named_children()
        if isinstance(child, Gated)
    ]
    for _, _, gated in held:
        if isinstance(gated, GatedLinear):
            gated.require_foldable()
    for owner, name, gated in held:
        setattr(owner, name, gated.settle())
    trained = set(control.thawed)
    for name, parameter in model.named_parameters():
        if name in trained:
            parameter.requires_grad_(True)
    return control
