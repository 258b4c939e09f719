"""`merge`: fold adapters into the weights, so that they cost nothing any more."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import TYPE_CHECKING

from torch import nn

from peft_vision.backbones import view
from peft_vision.compressed import CompressedModel
from peft_vision.errors import BadSetting, UnsupportedSite
from peft_vision.history import History
from peft_vision.loading import base_of, replay
from peft_vision.plan import Plan
from peft_vision.wrapping import is_adapted

if TYPE_CHECKING:
    from peft_vision.adapted import AdaptedModel


def merge(
    model: nn.Module, base: nn.Module | None = None, *, dequantize: bool = False
) -> nn.Module:
    """The model with its adapters folded into the base, as a copy; the model given is untouched.

    Adapters of a base in fewer bits are folded into the base in full precision, which is loaded
    again from where it came from: what they learned stays exact, and the base's own rounding goes.

    Args:
        model: an adapted model; any other one is copied.
        base: in full precision, where no source can load it.
        dequantize: fold into the weights as they were trained with, rounding included.

    Returns:
        The plain backbone; a CompressedModel where the structure was changed, or where something
        of an adapter cannot be folded and stays.

    Raises:
        UnsupportedSite: a layer of the adapter cannot be merged.
        WrongBase: the base is needed and cannot be had, or is another one.
        BadSetting: the base in full precision is gone; `dequantize` is the only way.
    """
    if not is_adapted(model):
        return copy.deepcopy(model)
    adapted: AdaptedModel = model  # type: ignore[assignment]
    if adapted.history.quantized:
        full = _in_full_precision(adapted, base, dequantize=dequantize)
    else:
        full = copy.deepcopy(adapted)
    history = adapted.history.in_full_precision()
    plain = _unload(full)
    left = _fold(plain, history)
    plain.requires_grad_(True)  # as models are built; PEFT leaves them frozen
    if not left.changed_structure:
        return plain
    return CompressedModel(plain, left)


def _unload(adapted: AdaptedModel) -> nn.Module:
    try:
        plain: nn.Module = adapted.merge_and_unload()
    except (NotImplementedError, AttributeError, ValueError) as error:
        raise UnsupportedSite(f"This adapter cannot be merged: {error}") from error
    return plain


def _fold(plain: nn.Module, history: History) -> History:
    """Fold what adapters put into the model, last first; the history of what is left."""
    gone = [
        step
        for method, step in reversed(history.adapters)
        if method.fold(view(plain), step.decisions)
    ]
    left = tuple(step for step in history.plan.steps if not any(step is other for other in gone))
    stays = history.merged or len(gone) < len(history.adapters)
    return replace(history, plan=Plan(left), merged=len(left) if stays else 0)


def _in_full_precision(
    model: AdaptedModel, base: nn.Module | None, *, dequantize: bool
) -> AdaptedModel:
    history = model.history
    if dequantize:
        return model.dequantized()
    if history.changed_structure:
        raise BadSetting(
            "The base's structure was changed before its weights were stored in fewer bits, so "
            "the full weights cannot be loaded again. Possible: merge(model, dequantize=True)."
        )
    full: AdaptedModel = replay(
        base_of(history, base, "merge(model, base=...)"), history.in_full_precision(), empty=False
    )
    full.load_tensors(model.adapter_tensors(), {n: p.data for n, p in model.parts().items()})
    return full
