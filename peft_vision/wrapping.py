"""`wrap`: put a method onto a model."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from peft_vision.backbones import view
from peft_vision.compensation import Compensation, apply_compensated
from peft_vision.compressed import CompressedModel
from peft_vision.cost import measure, unwrap
from peft_vision.errors import BadSetting, GradientUnproven
from peft_vision.history import History, fingerprint
from peft_vision.importance import as_evidence
from peft_vision.lookup import stems
from peft_vision.method import Adapter, Evidence, Method, find, make, name_of
from peft_vision.plan import Step
from peft_vision.presets import expand
from peft_vision.proof import prove_gradient

if TYPE_CHECKING:
    from peft_vision.adapted import AdaptedModel


def wrap(
    model: nn.Module,
    method: str | Method,
    *,
    quantize: str | None = None,
    data: Any = None,
    image_size: tuple[int, int] | int | None = None,
    inputs: Any = None,
    **settings: Any,
) -> AdaptedModel | CompressedModel:
    """Put a method, or a preset of several, onto a model, in place.

    Args:
        model: a timm or transformers backbone, any module, or an already wrapped model.
        method: name of a method or preset (`peft_vision.methods()`), or a Method object.
        quantize: store the base's linears in fewer bits first: the name of a quantizer.
        data: (images, labels) batches for methods that decide by data; what a pruner leaves is then
            fitted again on them, as by `compress`.
        image_size: height and width, for models that do not say theirs.
        inputs: for adapters on models that take more than images: a tuple of arguments, or a
            mapping, by which it is proven that every adapter trains.
        settings: the method's settings; each card lists them. Those of a preset go to each of its
            methods that has a setting of that name.

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
    for one in (*_quantizer(quantize), *steps):
        model = _wrap_one(model, one, data, image_size, inputs)
    return model  # type: ignore[return-value]


def _quantizer(name: str | None) -> list[Method]:
    known = list(stems("quantizers"))
    if name is not None and name not in known:
        raise BadSetting(f"quantize is {name!r}; possible: {', '.join(known)}.")
    return [] if name is None else [make(name)]


def _methods(name: str, settings: dict[str, Any]) -> list[Method]:
    parts = expand(name)
    fields = {part: {f.name for f in dataclasses.fields(find(part))} for part, _ in parts}
    if len(parts) > 1:
        known = sorted(set().union(*fields.values()))
        for key in settings:
            if key not in known:
                raise BadSetting(
                    f"{name} is made of {', '.join(fields)}, and none of them has a setting "
                    f"{key!r}. Their settings: {', '.join(known)}."
                )
        return [
            make(part, {**preset, **{k: v for k, v in settings.items() if k in fields[part]}})
            for part, preset in parts
        ]
    only, preset = parts[0]
    return [make(only, {**preset, **settings})]


def _wrap_one(
    model: nn.Module,
    method: Method,
    data: Any,
    image_size: tuple[int, int] | int | None,
    inputs: Any,
) -> nn.Module:
    history, inner = History.of(model), unwrap(model)
    backbone = view(inner)
    evidence = Evidence(None if data is None else list(data), heads=as_evidence)
    with _still(inner, data):
        decisions = method.decide(backbone, method.strength, evidence)
    if isinstance(method, Adapter) and not decisions:
        raise BadSetting("The adapter has no targets at strength 0.")
    if history.before is None and inputs is None and (backbone.input_size or image_size):
        # Where one image alone is not enough for the model, the proof of gradient says so.
        with contextlib.suppress(TypeError, ValueError, RuntimeError):
            history.before = measure(inner, image_size).to_json()
    if history.fingerprint is None:
        history.fingerprint = fingerprint(backbone.core, [s.layer for s in backbone.classifier])
    step = Step(name_of(method), method.settings(), method.strength, decisions)
    if evidence.batches is None or not method.reduces:
        method.apply(backbone, step.decisions)
    else:
        with torch.no_grad(), _still(inner, data):
            apply_compensated(inner, [method], [decisions], evidence.batches, Compensation())
    if isinstance(method, Adapter):
        adapted = adapt(model, method, history.then(step), image_size=image_size, inputs=inputs)
        method.learn(view(unwrap(adapted)), step.decisions, evidence)
        return adapted
    if is_adapted(model):
        model.history = history.then(step)  # type: ignore[assignment]
        return model
    return CompressedModel(inner, history.then(step))


@contextlib.contextmanager
def _still(model: nn.Module, data: Any) -> Iterator[None]:
    """Images are shown to the model as it will run: nothing in it is dropped at random."""
    training = model.training and data is not None
    if training:
        model.eval()
    try:
        yield
    finally:
        if training:
            model.train()


def adapt(
    model: nn.Module,
    method: Adapter,
    history: History,
    *,
    image_size: tuple[int, int] | int | None = None,
    inputs: Any = None,
    empty: bool = False,
    again: bool = False,
) -> AdaptedModel:
    """Have the last step of a history, which has been applied, trained; and prove that it trains.

    Args:
        model: a plain, compressed or adapted model.
        empty: leave what PEFT injects on `meta`, to be loaded.
        again: it was proven when it was made; a model that cannot be run on images alone is loaded
            without another proof.

    Raises:
        BadSetting: the model carries an adapter of PEFT's already and this is another.
        GradientMissing: it would not train.
    """
    from peft_vision.adapted import AdaptedModel

    decisions = history.plan.steps[-1].decisions
    config = method.config(view(unwrap(model)), decisions)
    if config is None and isinstance(model, AdaptedModel):
        model.history = history
        adapted = model
    else:
        _require_room(model, history)
        adapted = AdaptedModel(unwrap(model), config, history, low_cpu_mem_usage=empty)
    adapted.train_parts()
    if not empty:
        method.start(view(unwrap(adapted)), decisions)
        with contextlib.suppress(GradientUnproven) if again else contextlib.nullcontext():
            prove_gradient(adapted, image_size, inputs)
    return adapted


def _require_room(model: nn.Module, history: History) -> None:
    from peft_vision.adapted import AdaptedModel

    if isinstance(model, AdaptedModel) and model.injected:
        *_, last = history.plan.steps
        raise BadSetting(
            f"The model carries an adapter that PEFT injected, and {last.method} would be a second "
            "one on top of it. Merge first, or load the second beside it: "
            "model.load_adapter(folder, name)."
        )


def is_adapted(model: nn.Module) -> bool:
    """Whether `model` carries adapters (PEFT need not be imported to know)."""
    return any(cls.__module__ == "peft_vision.adapted" for cls in type(model).__mro__)
