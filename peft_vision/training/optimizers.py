"""Optimizers that PEFT makes for low-rank updates: LoRA+, LoRA-FA, Riemannian preconditioning.

PEFT has a factory for each, ``create_<name>_optimizer``; the name is what a recipe says.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from peft_vision.errors import BadSetting
from peft_vision.training.settings import TrainSettings

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

PAIRED = ("lorafa",)
"""Those that take a layer's update to be two matrices and nothing else."""


def is_from_peft(name: str) -> bool:
    """Whether an optimizer of a recipe is one of PEFT's."""
    return name in ("loraplus", "lorafa", "riemannian")


def peft_optimizer(model: nn.Module, settings: TrainSettings) -> Optimizer:
    """PEFT's optimizer of that name over the trainable parameters of an adapted model.

    LoRA-FA freezes the first matrix of every update.

    Raises:
        BadSetting: the model has no low-rank updates, or none that the optimizer can take.
    """
    import torch

    name = settings.optimizer
    config = _low_rank(model, name)
    _require_pairs(model, name)
    factory: Any = getattr(importlib.import_module("peft.optimizers"), f"create_{name}_optimizer")
    rate, decay = settings.learning_rate, settings.weight_decay
    try:
        if name in PAIRED:
            made = factory(model, config.r, config.lora_alpha, rate, weight_decay=decay)
        elif name == "loraplus":
            ratio = {"loraplus_lr_ratio": settings.learning_rate_ratio}
            made = factory(model, torch.optim.AdamW, lr=rate, **ratio, loraplus_weight_decay=decay)
        else:
            made = factory(model, torch.optim.AdamW, lr=rate, weight_decay=decay)
    except ValueError as error:
        raise BadSetting(f"train.optimizer={name}: {error}") from error
    optimizer: Optimizer = made
    return optimizer


def _low_rank(model: nn.Module, name: str) -> Any:
    """The configuration of the model's low-rank updates."""
    import peft

    configs = model.peft_config.values() if isinstance(model, peft.PeftModel) else ()
    found = next((c for c in configs if c.peft_type == peft.PeftType.LORA), None)
    if found is None or not _updates(model):
        has = ", ".join(str(c.peft_type.value) for c in configs) or "no adapter of PEFT's"
        raise BadSetting(
            f"train.optimizer={name} is for low-rank updates, and {type(model).__name__} has "
            f"{has}. Possible: adamw, or an adapter with low-rank updates."
        )
    return found


def _updates(model: nn.Module) -> list[list[nn.Parameter]]:
    """The parameters of each update."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [
        [p for name, p in module.named_parameters() if not name.startswith("base_layer.")]
        for module in model.modules()
        if isinstance(module, BaseTunerLayer)
    ]


def _require_pairs(model: nn.Module, name: str) -> None:
    if name not in PAIRED:
        return
    for update in _updates(model):
        if len(update) != 2 or any(p.ndim != 2 or not p.requires_grad for p in update):
            raise BadSetting(
                f"train.optimizer={name} takes updates of two trained matrices each; an update of "
                f"this model has tensors of {[tuple(p.shape) for p in update]}. Possible: plain "
                "low-rank updates of linears, or loraplus."
            )
