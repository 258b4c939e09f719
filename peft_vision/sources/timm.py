"""Models of timm, by architecture name."""

from __future__ import annotations

import inspect
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from peft_vision.errors import ArtifactError, BadSetting
from peft_vision.lookup import unknown

MODULES = ("timm.models",)


@lru_cache(maxsize=1)
def names() -> list[str]:
    """Every architecture of the installed timm."""
    import timm

    return list(timm.list_models())


def build(spec: dict[str, Any], *, weights: bool) -> nn.Module:
    """Build an architecture.

    Raises:
        UnknownName: timm has no such architecture.
        BadSetting: it does not take one of the arguments.
        ArtifactError: the pretrained weights cannot be had.
    """
    import timm

    name, kwargs = str(spec["name"]), dict(spec.get("kwargs", {}))
    if weights and spec.get("tag") and "." not in name:
        name = f"{name}.{spec['tag']}"
    if name.partition(".")[0] not in names():
        raise unknown("timm architecture", name, names())
    try:
        return timm.create_model(name, pretrained=weights, **_tuples(kwargs))  # type: ignore[no-any-return]
    except TypeError as error:
        raise BadSetting(f"timm/{name} does not take these arguments: {error}.") from error
    except (OSError, RuntimeError) as error:
        if not weights:
            raise
        raise ArtifactError(
            f"The pretrained weights of timm/{name} cannot be had: {str(error).splitlines()[0]} "
            "Possible: connect to the Hub, or pretrained=false for random weights."
        ) from error


def spec_of(model: Any) -> dict[str, Any] | None:
    """How to build `model` again: its architecture and where it differs from the default."""
    found = getattr(model, "pretrained_cfg", None)
    config: dict[str, Any] = found if isinstance(found, dict) else {}
    name = str(config.get("architecture"))
    if name not in names():
        return None
    if "peft_vision_source" in config:
        return dict(config["peft_vision_source"])
    return {
        "source": "timm",
        "name": name,
        "tag": config.get("tag"),
        "license": config.get("license"),
        "kwargs": differences(model, name),
    }


def differences(model: Any, name: str) -> dict[str, Any]:
    """Constructor arguments in which `model` differs from the architecture's defaults."""
    import timm

    with torch.device("meta"):
        default = timm.create_model(name, pretrained=False)
    taken = inspect.signature(type(model).__init__).parameters
    found = {}
    for argument, read in READERS.items():
        if argument not in taken:
            continue
        mine, theirs = read(model), read(default)
        if mine is not None and mine != theirs:
            found[argument] = list(mine) if isinstance(mine, tuple) else mine
    return found


def _blocks(model: Any) -> list[Any]:
    container = getattr(model, "blocks", None)
    return list(container.children()) if isinstance(container, nn.Module) else []


def _first_block(model: Any) -> Any:
    return next(iter(_blocks(model)), None)


def _last_block(model: Any) -> Any:
    return next(reversed(_blocks(model)), None)


def _mlp_ratio(model: Any) -> float | None:
    block, width = _first_block(model), getattr(model, "embed_dim", None)
    down = getattr(getattr(block, "mlp", None), "fc2", None)
    return down.in_features / width if down is not None and width else None


def _attribute(path: str) -> Any:
    def read(model: Any) -> Any:
        value = model
        for name in path.split("."):
            value = getattr(value, name, None)
        if isinstance(value, nn.Module):  # convolutional models keep the layer under that name
            return None
        return tuple(value) if isinstance(value, list | tuple) else value

    return read


def _pooling(model: Any) -> Any:
    """The name of the pooling, which transformers keep as such and others within a layer."""
    for path in ("global_pool", "global_pool.pool_type", "head.global_pool.pool_type"):
        found = _attribute(path)(model)
        if isinstance(found, str):
            return found
    return None


def _channels(model: Any) -> int | None:
    first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    return None if first is None else int(first.in_channels)


READERS: dict[str, Any] = {
    "num_classes": _attribute("num_classes"),
    "img_size": _attribute("patch_embed.img_size"),
    "patch_size": _attribute("patch_embed.patch_size"),
    "in_chans": lambda m: _attribute("patch_embed.proj.in_channels")(m) or _channels(m),
    "global_pool": _pooling,
    "embed_dim": _attribute("embed_dim"),
    "depth": lambda m: len(_blocks(m)) or None,
    "num_heads": lambda m: getattr(getattr(_first_block(m), "attn", None), "num_heads", None),
    "mlp_ratio": _mlp_ratio,
    "reg_tokens": _attribute("num_reg_tokens"),
    "num_reg_tokens": _attribute("num_reg_tokens"),
    "class_token": _attribute("has_class_token"),
    "dynamic_img_size": _attribute("dynamic_img_size"),
    "drop_rate": _attribute("head_drop.p"),
    "pos_drop_rate": _attribute("pos_drop.p"),
    "attn_drop_rate": lambda m: _attribute("attn.attn_drop.p")(_first_block(m)),
    "proj_drop_rate": lambda m: _attribute("attn.proj_drop.p")(_first_block(m)),
    "drop_path_rate": lambda m: _attribute("drop_path1.drop_prob")(_last_block(m)),
}


def _tuples(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in kwargs.items()}
