"""The models of the support matrix: of every family the smallest, with random weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

SHRUNK = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "intermediate_size": 128,
    "image_size": 64,
    "encoder_layers": 2,
    "d_model": 64,
}
"""What a transformers configuration is made small by, where it has a field of that name."""

DEPTHS = ("depths", "num_blocks", "layer_depths")
"""Fields that hold one number of blocks per stage: one block each."""

FAILURES = (
    RuntimeError,
    ValueError,
    TypeError,
    AttributeError,
    LookupError,
    ImportError,
    OSError,
)
"""What a configuration that does not fit, or a package that is not there, raises."""

NOT_BACKBONES = frozenset(
    {"timm_wrapper", "timm_backbone", "shieldgemma2", "imagegpt", "perceiver"}
)
"""In transformers' lists, and either somebody else's model in a wrapper or no vision backbone."""


LARGE = 150_000_000
"""Parameters above which a timm model is built with two blocks."""


def timm_families() -> list[str]:
    """Every module of timm that registers models."""
    from timm.models import list_modules

    return [str(name) for name in list_modules()]


def smallest_of(module: str) -> str:
    """The model of a timm module with the fewest parameters."""
    import timm

    sizes = {}
    for name in timm.list_models(module=module):
        # A few constructors read values, which the meta device has none of; their sisters do not.
        with contextlib.suppress(RuntimeError, NotImplementedError), torch.device("meta"):
            sizes[name] = sum(p.numel() for p in timm.create_model(name).parameters())
    return min(sizes, key=lambda name: (sizes[name], name)) if sizes else _first(module)


def _first(module: str) -> str:
    import timm

    return str(timm.list_models(module=module)[0])


def build_timm(name: str) -> nn.Module:
    """A model of timm by name."""
    import timm

    with torch.device("meta"):
        size = sum(p.numel() for p in timm.create_model(name).parameters())
    shallow = {"depth": 2} if size > LARGE else {}
    model: nn.Module = timm.create_model(name, pretrained=False, **shallow)
    return model


def transformers_families() -> list[str]:
    """Every vision backbone that transformers lists for classification or as a backbone."""
    from transformers.models.auto import modeling_auto as auto

    listed = {*auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES}
    listed |= {*auto.MODEL_FOR_BACKBONE_MAPPING_NAMES}
    listed |= {name for name in auto.MODEL_FOR_IMAGE_MAPPING_NAMES if name.endswith("vision_model")}
    return sorted(listed - NOT_BACKBONES)


def build_transformers(family: str) -> nn.Module:
    """A small model of a family: for classification where there is such a class.

    Raises:
        ValueError: no configuration that was tried builds; with the last reason.
    """
    from transformers import (
        CONFIG_MAPPING,
        AutoBackbone,
        AutoModel,
        AutoModelForImageClassification,
    )
    from transformers.models.auto import modeling_auto as auto

    kinds: list[Any] = [AutoModel]
    if family in auto.MODEL_FOR_BACKBONE_MAPPING_NAMES and family not in auto.MODEL_MAPPING_NAMES:
        kinds = [AutoBackbone]
    if family in auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES:
        kinds = [AutoModelForImageClassification, AutoModel]
    reason = ""
    for config in _configs(CONFIG_MAPPING[family]):
        for kind in kinds:
            try:
                model: nn.Module = kind.from_config(config)
                with torch.no_grad():
                    model.eval()(pixel_values=torch.zeros(1, 3, *image_size_of(model)))
            except FAILURES as e:
                reason = f"{type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''}"
                continue
            return model
    raise ValueError(f"no small configuration builds: {reason}")


def _configs(kind: type[Any]) -> Iterator[Any]:
    """A configuration with small widths and depths, one with small depths, the default one."""
    shallow = {"num_hidden_layers": 2, "image_size": 64}
    yield from (_shrunk(kind, SHRUNK), _shrunk(kind, shallow), kind())


def _shrunk(kind: type[Any], sizes: dict[str, int]) -> Any:
    default = kind()
    holder = default.vision_config if "vision_config" in default.to_dict() else default
    changes: dict[str, Any] = {
        name: value for name, value in sizes.items() if isinstance(getattr(holder, name, None), int)
    }
    for name in DEPTHS:
        depths = getattr(holder, name, None)
        if isinstance(depths, (list, tuple)) and all(isinstance(d, int) for d in depths):
            changes[name] = [min(d, 1) for d in depths]
    return kind(vision_config=changes) if holder is not default else kind(**changes)


def image_size_of(model: nn.Module) -> tuple[int, int]:
    """Height and width of the images that a model is tried with."""
    said = getattr(model, "pretrained_cfg", None)
    if said:
        return tuple(said["input_size"][1:])  # type: ignore[return-value]
    config = getattr(model, "config", None)
    config = getattr(config, "vision_config", config)
    size = getattr(config, "image_size", None)
    if isinstance(size, int):
        return (size, size)
    if isinstance(size, (list, tuple)) and len(size) == 2:
        return (int(size[0]), int(size[1]))
    return (64, 64)
