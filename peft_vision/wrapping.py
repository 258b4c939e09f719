"""`wrap`: put a method onto a model. `merge`: fold adapters away again."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from torch import nn

from peft_vision.backbones import view
from peft_vision.backbones.sites import Backbone
from peft_vision.compressed import CompressedModel
from peft_vision.cost import measure, unwrap
from peft_vision.errors import BadSetting
from peft_vision.history import History, fingerprint
from peft_vision.method import Adapter, Evidence, Method, make, name_of
from peft_vision.plan import Step
from peft_vision.presets import expand

if TYPE_CHECKING:
    from peft_vision.adapted import AdaptedModel


def wrap(
    model: nn.Module,
    method: str | Method,
    *,
    data: Any = None,
    image_size: tuple[int, int] | int | None = None,
    **settings: Any,
) -> AdaptedModel | CompressedModel:
    """Put a method, or a preset of several, onto a model, in place.

    Args:
        model: a timm or transformers backbone, any module, or an already wrapped model.
        method: name of a method or preset (`peft_vision.methods()`), or a Method object.
        data: (images, labels) batches for methods that decide by data.
        image_size: height and width, for models that do not say theirs.
        settings: the method's settings; each card lists them.

    Returns:
        A `peft.PeftModel` for adapters, a CompressedModel otherwise. It is called as `model` is.

    Raises:
        UnknownName: no such method. BadSetting: a setting does not exist or is out of range.
        UnsupportedSite: the backbone lacks what the method acts on, by name.
        GradientMissing: an adapter would not train.
    """
    steps = [method] if isinstance(method, Method) else _methods(method, settings)
    if isinstance(method, Method) and settings:
        raise BadSetting(
            f"Settings {sorted(settings)} were given beside a Method that has its own."
        )
    for one in steps:
        model = _wrap_one(model, one, data, image_size)
    return model  # type: ignore[return-value]


def _methods(name: str, settings: dict[str, Any]) -> list[Method]:
    parts = expand(name)
    if len(parts) == 1:
        only, preset = parts[0]
        return [make(only, {**preset, **settings})]
    if settings:
        raise BadSetting(
            f"{name} is a preset of {len(parts)} methods and takes no settings of its own; wrap "
            f"them one after the other: {', '.join(part for part, _ in parts)}."
        )
    return [make(part, preset) for part, preset in parts]


def _wrap_one(
    model: nn.Module, method: Method, data: Any, image_size: tuple[int, int] | int | None
) -> nn.Module:
    history, inner = History.of(model), unwrap(model)
    backbone = view(inner)
    decisions = method.decide(backbone, method.strength, Evidence(data))
    if history.before is None and (backbone.input_size or image_size):
        history.before = measure(inner, image_size).to_json()
    if history.fingerprint is None:
        history.fingerprint = fingerprint(inner, [site.layer for site in backbone.classifier])
    step = Step(name_of(method), method.settings(), method.strength, decisions)
    method.apply(backbone, step.decisions)
    if isinstance(method, Adapter):
        return adapt(backbone, method, history.then(step), image_size=image_size)
    if is_adapted(model):
        model.history = history.then(step)  # type: ignore[assignment]
        return model
    return CompressedModel(inner, history.then(step))


def adapt(
    backbone: Backbone,
    method: Adapter,
    history: History,
    *,
    image_size: tuple[int, int] | int | None = None,
    empty: bool = False,
) -> AdaptedModel:
    """Inject an adapter, and prove that it trains.

    Args:
        empty: leave the adapter's tensors on `meta`, to be loaded.
    """
    from peft_vision.adapted import AdaptedModel, prove_gradient

    decisions = history.plan.steps[-1].decisions
    if not decisions:
        raise BadSetting("The adapter has no targets at strength 0.")
    config = method.config(backbone, decisions)
    config.base_model_name_or_path = base_name(history)
    adapted = AdaptedModel(backbone.model, config, history, low_cpu_mem_usage=empty)
    if not empty:
        prove_gradient(adapted, image_size)
    return adapted


def base_name(history: History) -> str | None:
    """The base's name as a user would type it."""
    source = history.source
    return f"{source['source']}/{source['name']}" if source and source.get("name") else None


def is_adapted(model: nn.Module) -> bool:
    """Whether `model` carries adapters (PEFT need not be imported to know)."""
    return any(cls.__module__ == "peft_vision.adapted" for cls in type(model).__mro__)


def merge(model: nn.Module) -> nn.Module:
    """The model with its adapters folded into the base, as a copy; the model given is untouched.

    Returns:
        The plain backbone; a CompressedModel where the structure was changed as well.
    """
    if not is_adapted(model):
        return copy.deepcopy(model)
    merged = copy.deepcopy(model).merge_and_unload()  # type: ignore[operator]
    history = History.of(model)
    if not history.changed_structure:
        return merged  # type: ignore[no-any-return]
    return CompressedModel(merged, history.without_adapters())
