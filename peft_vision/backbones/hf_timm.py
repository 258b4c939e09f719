"""transformers' wrapper around timm models: the timm model is seen, through the wrapper."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from peft_vision.backbones import view as view_of_any
from peft_vision.backbones.sites import Backbone

MODULES = ("transformers.models.timm_wrapper.modeling_timm_wrapper",)
INNER = "timm_model"


def why_not(model: nn.Module) -> str:
    """What keeps the model from being understood; empty when nothing does."""
    inside = INNER in dict(model.named_children())
    return "" if inside else f"{type(model).__name__} holds no {INNER}"


def view(model: Any) -> Backbone:
    """See the timm model as sites; names of layers begin with the wrapper's."""
    return replace(view_of_any(model.timm_model), model=model, prefix=f"{INNER}.")
