"""How the checkpoint wants its images: size, crop, interpolation, mean and standard deviation."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_vision.errors import BadSetting, DataError

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor, nn

    from peft_vision.data.settings import Augmentation

Preprocessing = dict[str, Any]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
_KEYS = ("mean", "std", "size", "interpolation", "crop_pct")
_PILLOW_RESAMPLING = {
    0: "nearest",
    1: "lanczos",
    2: "bilinear",
    3: "bicubic",
    4: "box",
    5: "hamming",
}


def default(size: int = 224) -> Preprocessing:
    """What ImageNet models commonly use."""
    return {
        "mean": list(IMAGENET_MEAN),
        "std": list(IMAGENET_STD),
        "size": size,
        "interpolation": "bicubic",
        "crop_pct": 0.9,
    }


def of_model(model: nn.Module, name: str, size: int | None) -> Preprocessing:
    """The preprocessing that belongs to the weights of `model`.

    Args:
        model: the plain backbone; timm models carry their own description.
        name: what the model was made from; of transformers/<folder or repository> the
            preprocessor_config.json is read.
        size: pixels, where it is not the checkpoint's own.
    """
    described = getattr(model, "pretrained_cfg", None)
    if isinstance(described, Mapping) and described.get("mean"):
        found = _from_timm(model)
    else:
        found = _from_transformers(model, name.removeprefix("transformers/"))
    if size is not None and size != found["size"]:
        found = {**found, "size": size}
    return found


def _from_timm(model: nn.Module) -> Preprocessing:
    from timm.data import resolve_data_config

    config = resolve_data_config({}, model=model)
    return {
        "mean": [float(value) for value in config["mean"]],
        "std": [float(value) for value in config["std"]],
        "size": int(config["input_size"][-1]),
        "interpolation": str(config["interpolation"]),
        "crop_pct": float(config["crop_pct"]),
    }


def _from_transformers(model: nn.Module, name: str) -> Preprocessing:
    config = getattr(model, "config", None)
    size = getattr(config, "image_size", None)
    found = default(int(size) if isinstance(size, int) else 224)
    file = _processor_file(name)
    if file is None:
        return found
    described = json.loads(file.read_text())
    crop = _side(described.get("crop_size")) if described.get("do_center_crop") else None
    resized = _side(described.get("size")) or found["size"]
    found["size"] = crop or resized
    found["crop_pct"] = min(1.0, (crop or resized) / resized)
    found["mean"] = described.get("image_mean") or found["mean"]
    found["std"] = described.get("image_std") or found["std"]
    found["interpolation"] = _PILLOW_RESAMPLING.get(described.get("resample", 3), "bicubic")
    return found


def _side(size: Any) -> int | None:
    if isinstance(size, int):
        return size
    if isinstance(size, Mapping):
        for key in ("height", "shortest_edge", "longest_edge"):
            if isinstance(size.get(key), int):
                return int(size[key])
    return None


def _processor_file(name: str) -> Path | None:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    local = Path(name) / "preprocessor_config.json"
    if local.exists():
        return local
    if Path(name).exists() or name.count("/") != 1:
        return None
    try:
        return Path(hf_hub_download(name, "preprocessor_config.json"))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError):
        return None


def check(described: Mapping[str, Any]) -> None:
    """Say which part of a stored preprocessing is missing.

    Raises:
        DataError: the mapping cannot be used.
    """
    missing = [key for key in _KEYS if key not in described]
    if missing:
        raise DataError(
            f"The stored preprocessing lacks {', '.join(missing)}; it needs {', '.join(_KEYS)}."
        )


def evaluation_transform(described: Mapping[str, Any]) -> Callable[[Image], Tensor]:
    """PIL image -> normalized tensor `3 H W`, without randomness."""
    from timm.data import create_transform

    check(described)
    transform: Callable[[Image], Tensor] = create_transform(
        input_size=(3, described["size"], described["size"]),
        mean=tuple(described["mean"]),
        std=tuple(described["std"]),
        interpolation=described["interpolation"],
        crop_pct=described["crop_pct"],
        is_training=False,
    )
    return transform


def training_transform(
    described: Mapping[str, Any], augmentation: Augmentation
) -> Callable[[Image], Tensor]:
    """PIL image -> normalized tensor `3 H W`; all randomness comes from torch's CPU generator."""
    import torch
    from torchvision.transforms import v2

    check(described)
    side = described["size"]
    modes = {mode.value: mode for mode in v2.InterpolationMode}
    if described["interpolation"] not in modes:
        raise BadSetting(
            f"Interpolation {described['interpolation']!r} is not known; {', '.join(modes)} are."
        )
    mode = modes[described["interpolation"]]
    steps: list[Any] = []
    if augmentation.crop < 1:
        steps.append(v2.RandomResizedCrop(side, (augmentation.crop, 1.0), interpolation=mode))
    else:
        resized = round(side / described["crop_pct"])
        steps += [v2.Resize(resized, interpolation=mode), v2.CenterCrop(side)]
    steps.append(v2.RandomHorizontalFlip(augmentation.flip))
    if augmentation.flip_vertical:
        steps.append(v2.RandomVerticalFlip(augmentation.flip_vertical))
    if augmentation.rand_augment is not None:
        chosen = augmentation.rand_augment
        fill = [round(255 * value) for value in described["mean"]]
        steps.append(v2.RandAugment(chosen.operations, chosen.magnitude, fill=fill))
    steps += [v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
    steps.append(v2.Normalize(described["mean"], described["std"]))
    transform: Callable[[Image], Tensor] = v2.Compose(steps)
    return transform
