"""Normalization layers, for the methods that train these and nothing else."""

from __future__ import annotations

from torch import nn

from peft_vision.adapters._origin import Origin
from peft_vision.backbones.sites import Backbone
from peft_vision.errors import UnsupportedSite


def prefers_norms(origin: Origin) -> bool:
    """Whether PEFT itself aims this method at normalization layers, in the models that it knows."""
    known = getattr(origin.tuner, "target_module_mapping", None) or {}
    named = [name.lower() for names in known.values() for name in names]
    return sum("norm" in name or "ln_" in name for name in named) * 2 > len(named)


def norms_in(backbone: Backbone) -> list[nn.Module]:
    """The layers that scale each feature and keep no running figures.

    Raises:
        UnsupportedSite: there are none.
    """
    found = [backbone.model.get_submodule(path) for path in norm_paths(backbone)]
    if not found:
        raise UnsupportedSite(
            f"{type(backbone.model).__name__} has no normalization layer without running figures "
            "(LayerNorm, RMSNorm); those of batches are no targets. Possible: a method on linears."
        )
    return found


def norm_paths(backbone: Backbone) -> list[str]:
    """Their dotted paths."""
    return [name for name, module in backbone.model.named_modules() if _is_norm(module)]


def _is_norm(module: nn.Module) -> bool:
    own = dict(module.named_parameters(recurse=False))
    scales = "weight" in own and own.keys() <= {"weight", "bias"} and own["weight"].dim() == 1
    leaf = not any(True for _ in module.children()) and not any(True for _ in module.buffers())
    return scales and leaf and "norm" in type(module).__name__.lower()
