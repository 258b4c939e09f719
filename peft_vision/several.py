"""Several adapters on one base: a second one loaded beside the first, and weighted sums of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
import torch
from peft.utils import ModulesToSaveWrapper, set_peft_model_state_dict
from torch import Tensor

from peft_vision.artifact import ADAPTER, read_record, read_weights
from peft_vision.backbones import view
from peft_vision.backbones.sites import Backbone
from peft_vision.errors import BadSetting, UnknownName, UnsupportedSite, WrongBase
from peft_vision.history import History
from peft_vision.method import Adapter, make
from peft_vision.plan import Step

INSIDE = "base_model.model."


def load_beside(model: peft.PeftModel, own: History, folder: Path, name: str) -> History:
    """Load the adapter of a folder as a further one of `model`; it becomes active by `set_adapter`.

    Args:
        model: with an adapter that PEFT injected.
        own: its history.
        name: what to call the further adapter.

    Returns:
        The further adapter's history.

    Raises:
        BadSetting: the name is taken, or it is of another kind than the adapters that are there.
        WrongBase: it was trained on another base.
        UnsupportedSite: it changes the model itself, and cannot be switched.
    """
    if name in model.peft_config:
        raise BadSetting(f"There is an adapter named {name!r} already; choose another name.")
    content = read_record(folder)
    other = History.of_record(content)
    if own.fingerprint and other.fingerprint and own.fingerprint != other.fingerprint:
        raise WrongBase(f"{folder} was trained on a base with other weights than the model's.")
    backbone = view(model.base_model.model)
    step = _injecting(own, other, folder)
    method: Any = make(step.method, dict(step.settings))
    config = _config(method, backbone, step, folder)
    _add(model, name, config, folder)
    there = INSIDE + str(content.get("prefix") or "")
    tensors = renamed(read_weights(folder / ADAPTER), there, INSIDE + backbone.prefix)
    set_peft_model_state_dict(model, tensors, adapter_name=name)
    return other


def _injecting(own: History, other: History, folder: Path) -> Step:
    """The one step of `other` that `own` does not share."""
    if other.changed_structure:
        raise UnsupportedSite(f"{folder} changed the base's structure; load it on its own.")
    shared = [(s.method, s.settings, s.decisions) for s in own.plan.steps]
    left = [s for s in other.plan.steps if (s.method, s.settings, s.decisions) not in shared]
    left = left or [s for s in other.plan.steps if issubclass(type(make(s.method)), Adapter)][-1:]
    if len(left) != 1:
        names = ", ".join(step.method for step in left)
        raise UnsupportedSite(
            f"{folder} is made of {names or 'nothing'}, and the model shares none of it. Only what "
            "PEFT injects can be switched: load it on its own, peft_vision.load(folder)."
        )
    return left[0]


def _config(method: Any, backbone: Backbone, step: Step, folder: Path) -> peft.PeftConfig:
    try:
        config = method.config(backbone, step.decisions)
    except KeyError as error:
        raise UnsupportedSite(
            f"{folder} acts on {error}, which this model does not have as it is wrapped now. Load "
            "it on its own: peft_vision.load(folder)."
        ) from error
    if config is None:
        raise UnsupportedSite(
            f"{folder} holds {step.method}, which is a part of the model and cannot be switched. "
            "Load it on its own: peft_vision.load(folder)."
        )
    found: peft.PeftConfig = config
    found.inference_mode = True
    return found


def _add(model: peft.PeftModel, name: str, config: peft.PeftConfig, folder: Path) -> None:
    kinds = {str(kind.peft_type) for kind in model.peft_config.values()}
    if str(config.peft_type) not in kinds:
        raise BadSetting(
            f"{folder} is of PEFT's kind {config.peft_type.value} and the model carries "
            f"{', '.join(sorted(kinds))}; PEFT keeps adapters of one kind beside each other."
        )
    model.add_adapter(name, config)


def renamed(tensors: Mapping[str, Tensor], old: str, new: str) -> dict[str, Tensor]:
    """Tensors whose names began with `old`, under names that begin with `new`."""
    return {
        new + name.removeprefix(old) if name.startswith(old) else name: tensor
        for name, tensor in tensors.items()
    }


def add_weighted(
    model: peft.PeftModel,
    adapters: Sequence[str],
    weights: Sequence[float],
    name: str,
    options: Mapping[str, Any],
) -> None:
    """A further adapter: a weighted sum of others, their classifiers included.

    Raises:
        UnknownName: one of `adapters` is not there.
        BadSetting: the adapters cannot be combined in this way, with PEFT's reason.
    """
    for adapter in adapters:
        if adapter not in model.peft_config:
            raise UnknownName(
                f"There is no adapter named {adapter!r}. There are: {', '.join(model.peft_config)}."
            )
    with _classifiers_aside(model, adapters[0]) as heads:
        try:
            model.base_model.add_weighted_adapter(list(adapters), list(weights), name, **options)
        except (ValueError, AttributeError) as error:
            raise BadSetting(f"These adapters cannot be combined: {error}") from error
    for head in heads:
        parts = [head.modules_to_save[adapter] for adapter in adapters]
        _average(head, list(zip(parts, weights, strict=True)), name)
    model.peft_config[name].modules_to_save = model.peft_config[adapters[0]].modules_to_save


@contextmanager
def _classifiers_aside(model: peft.PeftModel, first: str) -> Iterator[list[Any]]:
    """PEFT refuses to combine adapters that have a classifier each: they are taken out meanwhile.

    Yields:
        The wrappers that hold the classifiers.
    """
    places = [
        (owner, attribute, child)
        for owner in model.modules()
        for attribute, child in owner.named_children()
        if isinstance(child, ModulesToSaveWrapper)
    ]
    config = model.peft_config[first]
    named = config.modules_to_save
    for owner, attribute, wrapper in places:
        setattr(owner, attribute, wrapper.original_module)
    config.modules_to_save = None
    try:
        yield [wrapper for _, _, wrapper in places]
    finally:
        config.modules_to_save = named
        for owner, attribute, wrapper in places:
            setattr(owner, attribute, wrapper)


def _average(head: Any, parts: Sequence[tuple[torch.nn.Module, float]], name: str) -> None:
    """The weighted mean of classifiers; weights are normalized, since a classifier is no update."""
    total = sum(weight for _, weight in parts)
    states = [(part.state_dict(), weight / total) for part, weight in parts]
    head.update(name)
    head.modules_to_save[name].load_state_dict(
        {key: torch.stack([s[key] * w for s, w in states]).sum(0) for key in states[0][0]}
    )
