"""Parameter-efficient fine-tuning and compression of vision backbones."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from peft_vision import errors as errors
    from peft_vision import tracking as tracking
    from peft_vision.backbones import view as view
    from peft_vision.compression import compress as compress
    from peft_vision.cost import measure as measure
    from peft_vision.evaluation import evaluate as evaluate
    from peft_vision.exporting import export as export
    from peft_vision.finetuning import finetune as finetune
    from peft_vision.loading import load as load
    from peft_vision.mask_training import settle as settle
    from peft_vision.memory.estimate import estimate_memory as estimate_memory
    from peft_vision.merging import merge as merge
    from peft_vision.method import names as methods  # noqa: F401
    from peft_vision.recovery import recover as recover
    from peft_vision.sources import create_model as create_model
    from peft_vision.streams import Streams as Streams
    from peft_vision.wrapping import wrap as wrap

_PUBLIC = {
    "Streams": ("peft_vision.streams", "Streams"),
    "compress": ("peft_vision.compression", "compress"),
    "create_model": ("peft_vision.sources", "create_model"),
    "estimate_memory": ("peft_vision.memory.estimate", "estimate_memory"),
    "evaluate": ("peft_vision.evaluation", "evaluate"),
    "export": ("peft_vision.exporting", "export"),
    "finetune": ("peft_vision.finetuning", "finetune"),
    "load": ("peft_vision.loading", "load"),
    "measure": ("peft_vision.cost", "measure"),
    "merge": ("peft_vision.merging", "merge"),
    "methods": ("peft_vision.method", "names"),
    "recover": ("peft_vision.recovery", "recover"),
    "settle": ("peft_vision.mask_training", "settle"),
    "view": ("peft_vision.backbones", "view"),
    "wrap": ("peft_vision.wrapping", "wrap"),
}

_MODULES = ("errors", "tracking")

__all__ = sorted(("__version__", *_MODULES, *_PUBLIC))  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"peft_vision.{name}")
    if name not in _PUBLIC:
        raise AttributeError(f"module 'peft_vision' has no attribute {name!r}")
    module, attribute = _PUBLIC[name]
    return getattr(importlib.import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted(__all__)
