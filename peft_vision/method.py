"""What a method is, and how one is found: a method is one file, its stem is its name."""

from __future__ import annotations

import dataclasses
import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum, IntEnum
from importlib.metadata import entry_points
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from peft_vision.backbones.sites import Backbone
from peft_vision.errors import BadSetting
from peft_vision.lookup import nearest, stems, unknown
from peft_vision.plan import Decisions

if TYPE_CHECKING:
    import peft
    from torch import Tensor, nn

FOLDERS = ("adapters", "pruners", "decomposers", "quantizers", "heads")
CATALOG = "peft_vision.adapters._catalog"
ENTRY_POINTS = "peft_vision.methods"

MEAN_RANK = "mean_rank"
"""The name by which the mean rank of all scores of heads is asked for."""

T = TypeVar("T")


class Need(Enum):
    """What a method needs in order to decide."""

    NOTHING = "nothing"
    DATA = "data"
    TRAINING = "training"


class Stage(IntEnum):
    """When a method acts if several do."""

    EXACT = 0
    DEPTH = 1
    QUERIES = 2  # decided for every head: before heads go
    WIDTH = 3
    FACTOR = 4
    TOKENS = 5
    ADAPT = 6
    ROUTE = 7
    QUANTIZE = 8


@dataclass
class Evidence:
    """What a decision may look at besides the weights, and a memory for what is slow to compute.

    Attributes:
        batches: (images B 3 H W, labels B) pairs for methods that need data; iterable repeatedly.
        learned: what a method that was trained for this decision has learned (`Method.settle`).
        heads: (name, backbone, batches) -> what its heads are worth by the score of that name, L
            blocks x H heads, higher = keep, NaN where there is none; `score_names` lists the names.
        fits: what stays is fitted on the batches afterwards.
    """

    batches: Iterable[Any] | None = None
    learned: Any = None
    memory: dict[Hashable, Any] = field(default_factory=dict)
    heads: Callable[[str, Backbone, Iterable[Any] | None], Tensor] | None = None
    fits: bool = True

    def once(self, key: Hashable, compute: Callable[[], T]) -> T:
        """The value computed on the first call with this key."""
        if key not in self.memory:
            self.memory[key] = compute()
        result: T = self.memory[key]
        return result


@dataclass(frozen=True)
class Method(ABC):
    """A technique and its settings. Subclasses are frozen dataclasses; their fields are settings.

    `decide` may look at weights and data and returns JSON per site. `apply` carries decisions
    out in place; it reads no weight values, is deterministic and works on the `meta` device.
    """

    needs: ClassVar[Need] = Need.NOTHING
    stage: ClassVar[Stage] = Stage.WIDTH
    reduces: ClassVar[frozenset[str]] = frozenset()
    """Which budgets it helps to meet: of "flops", "params", "latency_ms"."""
    derived: ClassVar[bool] = False
    """Whether what it makes of a base follows from the base's weights and the plan, so that a saved
    folder need not hold them."""

    @property
    def strength(self) -> float:
        """How strongly `wrap` applies it, in [0, 1]; set by the settings."""
        return 1.0

    @abstractmethod
    def decide(self, backbone: Backbone, strength: float, evidence: Evidence) -> Decisions:
        """Site -> decision. Strength is a global quantile in [0, 1]; 0 changes nothing.

        Raises:
            UnsupportedSite: the backbone lacks what the method acts on.
        """

    @abstractmethod
    def apply(self, backbone: Backbone, decisions: Decisions) -> None:
        """Carry decisions out, in place.

        Raises:
            UnsupportedSite: a site of the plan does not exist, or a layer has no rule.
        """

    def settings(self) -> dict[str, Any]:
        """The settings as plain JSON."""
        return {
            f.name: list(v) if isinstance(v := getattr(self, f.name), tuple) else v
            for f in dataclasses.fields(self)
        }


class Trained(Method):
    """A method that is trained before it decides: masks, gates, rates.

    `compress` attaches it to a copy of the model, trains the copy, settles it, and then searches as
    for any other method; `decide` finds what was learned in ``evidence.learned``.
    """

    needs: ClassVar[Need] = Need.TRAINING

    @abstractmethod
    def attach(self, backbone: Backbone, target: float) -> None:
        """Put in what training is to fill in; layers that add to the loss are `Penalised`.

        Args:
            target: share of the base's multiply-accumulates that is to be left, in (0, 1].
        """

    @abstractmethod
    def settle(self, backbone: Backbone) -> Any:
        """Fold what training filled in into plain weights, in place, and take the layers out.

        Returns:
            What was learned; None where nothing was attached.
        """


class Adapter(Method):
    """A method that adds trainable parameters to a base whose weights stay.

    PEFT injects what `config` describes. What PEFT has no words for, `apply` puts into the model as
    modules of its own, and `trained` names their parameters.
    """

    stage: ClassVar[Stage] = Stage.ADAPT
    derived: ClassVar[bool] = True
    keeps_function: ClassVar[bool] = True
    """Whether a model wrapped with default settings computes what it did before, until trained."""

    def apply(self, backbone: Backbone, decisions: Decisions) -> None:
        """Prepare the backbone; the adapted model then injects `config`."""
        backbone.call_every_linear()

    def config(self, backbone: Backbone, decisions: Decisions) -> peft.PeftConfig | None:
        """PEFT's configuration for these decisions; None where PEFT has nothing to inject."""
        return None

    def start(self, backbone: Backbone, decisions: Decisions) -> None:
        """Give what PEFT injected its first values, where PEFT's own are not wanted."""

    def learn(self, backbone: Backbone, decisions: Decisions, evidence: Evidence) -> None:
        """First values that follow from data; called after `start` when a model is wrapped."""

    def trained(self, backbone: Backbone, decisions: Decisions) -> list[tuple[nn.Module, str]]:
        """(owner, attribute) of the parameters that are trained besides those that PEFT injects."""
        return []

    def fold(self, backbone: Backbone, decisions: Decisions) -> bool:
        """Fold what `apply` put in into plain weights, in place, once PEFT's part is merged.

        Returns:
            Whether nothing is left. What is left stays in the merged model as a part of it.
        """
        return True

    def foreign(self, backbone: Backbone, decisions: Decisions) -> str:
        """Why plain PEFT could not carry this adapter to a plain base; empty when it can."""
        return ""


def names() -> list[str]:
    """Every method there is, sorted: files, third parties', and what the installed PEFT offers."""
    return sorted({*filed(), *(point.name for point in _entry_points()), *offered()})


def filed() -> list[str]:
    """The methods that are files of this package, sorted."""
    return list(stems(*FOLDERS))


def offered() -> list[str]:
    """What the installed PEFT offers, sorted; PEFT is not imported."""
    return list(_catalog().names())


def find(name: str) -> type[Method]:
    """The class of a method; only its own file is imported.

    Raises:
        UnknownName: there is no such method; the message offers the nearest.
    """
    folder = stems(*FOLDERS).get(name)
    if folder is not None:
        module = importlib.import_module(f"peft_vision.{folder}.{name}")
        return _method_in(module.__name__, vars(module))
    if name in offered():
        found: type[Method] = _catalog().find(name)
        return found
    for point in _entry_points():
        if point.name == name:
            loaded: type[Method] = point.load()
            return loaded
    raise unknown("method", name, names())


def make(name: str, settings: Mapping[str, Any] | None = None) -> Method:
    """A method with settings.

    Raises:
        UnknownName: there is no such method.
        BadSetting: a setting does not exist or is out of range.

    >>> make("magnitude", {"ratio": 0.5}).strength
    0.5
    """
    cls, given = find(name), dict(settings or {})
    known = [f.name for f in dataclasses.fields(cls)]
    for key in given:
        if key not in known:
            near = nearest(key, known)
            hint = f"Did you mean {near[0]!r}? " if near else ""
            raise BadSetting(
                f"{name} has no setting {key!r}. {hint}Its settings: {', '.join(known) or 'none'}."
            )
    listed = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
    try:
        return cls(**listed)
    except TypeError as error:
        raise BadSetting(f"{name}: {error}.") from error


def score_names() -> list[str]:
    """Names of the scores by which a pruner may rank heads; no score is imported."""
    return [*stems("importance"), MEAN_RANK]


def name_of(method: Method) -> str:
    """The name by which `find` gives the class of `method`: its file's stem, or its entry point.

    A class that nobody registered is named by its module and class; its plan cannot be replayed.
    """
    cls = type(method)
    stem = cls.__module__.rpartition(".")[2]
    if cls.__module__ == f"peft_vision.{stems(*FOLDERS).get(stem)}.{stem}":
        return stem
    if cls.__module__ == CATALOG:
        return cls.__name__
    registered = (point.name for point in _entry_points() if point.load() is cls)
    return next(registered, f"{cls.__module__}.{cls.__qualname__}")


def check_range(name: str, value: float, low: float, high: float) -> None:
    """Refuse a setting outside [low, high].

    Raises:
        BadSetting: it is.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise BadSetting(f"{name} is {value!r}; it has to be a number in [{low:g}, {high:g}].")


def _method_in(module: str, namespace: Mapping[str, Any]) -> type[Method]:
    found = [
        value
        for value in namespace.values()
        if isinstance(value, type) and issubclass(value, Method) and value.__module__ == module
    ]
    if len(found) != 1:
        raise AssertionError(f"{module} has to define exactly one Method, it defines {len(found)}")
    return found[0]


def _entry_points() -> list[Any]:
    return list(entry_points(group=ENTRY_POINTS))


def _catalog() -> ModuleType:
    return importlib.import_module(CATALOG)
