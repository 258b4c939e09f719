"""Which parameters a method may train itself: those below a module, unless PEFT trains a copy."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def parameters_of(module: nn.Module) -> list[tuple[nn.Module, str]]:
    """(owner, attribute) of every parameter below `module` that can carry a gradient.

    Nothing is listed where PEFT has put a trained copy beside the module: the copy is PEFT's, and
    is saved by PEFT. Weights packed into fewer bits cannot be trained and are not listed.
    """
    if is_copied(module):
        return []
    return [
        (owner, name)
        for owner in module.modules()
        for name, parameter in owner.named_parameters(recurse=False)
        if parameter.is_floating_point()
    ]


def is_copied(module: nn.Module) -> bool:
    """Whether PEFT keeps `module` as it was, and a trained copy beside it."""
    return isinstance(getattr(module, "modules_to_save", None), nn.ModuleDict)


def plain_of(module: nn.Module) -> nn.Module:
    """The layer inside PEFT's wrappers: the trained copy of a head, the base of an update."""
    if is_copied(module):
        copies: nn.ModuleDict = module.modules_to_save  # type: ignore[assignment]
        active = getattr(module, "active_adapter", None)
        known = [name for name in (active if isinstance(active, list) else [active]) if name]
        chosen = next((name for name in known if name in copies), None)
        return plain_of(copies[chosen] if chosen else module.original_module)  # type: ignore[arg-type]
    inner = getattr(module, "base_layer", None)
    return plain_of(inner) if isinstance(inner, nn.Module) else module


def trained_dtype(model: nn.Module) -> torch.dtype:
    """The dtype for new trained parameters: the model's, but never less than float32."""
    floating = (p.dtype for p in model.parameters() if p.is_floating_point())
    return torch.promote_types(next(floating, torch.float32), torch.float32)


def matched(x: Tensor, weight: Tensor) -> Tensor:
    """`x` in the dtype of `weight`, where the model computes in another one."""
    return x if x.dtype == weight.dtype else x.to(weight.dtype)
