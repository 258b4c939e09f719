"""transformers' DINOv3 ViT: rotary positions, registers, plain or gated MLPs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from peft_vision.backbones import _hf_width
from peft_vision.backbones.assembly import (
    ABSENT,
    assemble,
    find_blocks,
    lacking,
    last_layers,
    size_in_config,
    whole_mlp,
)
from peft_vision.backbones.positions import (
    PositionParts,
    PositionsSite,
    plain,
    run,
    set_config_size,
)
from peft_vision.backbones.sites import Backbone, LayerSite, TokensSite
from peft_vision.layers.attention_parts import AttentionParts, halves
from peft_vision.layers.block import BlockParts
from peft_vision.layers.mlp import MlpParts
from peft_vision.layers.positions import Grid, without_rows
from peft_vision.layers.trunk import blocks_in

MODULES = ("transformers.models.dinov3_vit.modeling_dinov3_vit",)

MAPS = "its feature maps need every patch, and are read by others"

PLAIN = MlpParts(up=("up_proj",), down="down_proj")
GATED = MlpParts(up=("gate_proj", "up_proj"), down="down_proj")


def rotate(attention: nn.Module, heads: Tensor, rope: Any) -> Tensor:
    """Rotate the patches of queries or keys (B H N D) by (cosines, sines), each of patches x D."""
    cos, sin = rope
    prefix = heads.shape[2] - cos.shape[-2]
    patches = heads[:, :, prefix:]
    first, second = patches.chunk(2, dim=-1)
    turned = patches * cos + torch.cat([-second, first], dim=-1) * sin
    return torch.cat([heads[:, :, :prefix], turned], dim=2)


def mates(attention: nn.Module, width: int) -> list[int]:
    """The features of one half turn with those of the other."""
    return halves(width)


PARTS = BlockParts(
    norm1="norm1",
    attention="attention",
    after1=("layer_scale1", "drop_path"),
    norm2="norm2",
    mlp="mlp",
    after2=("layer_scale2", "drop_path"),
    attention_parts=AttentionParts(
        qkv=("q_proj", "k_proj", "v_proj"),
        out="o_proj",
        heads=("num_heads",),
        dropout="dropout",
        rotate=rotate,
        mates=mates,
    ),
    mlp_parts=PLAIN,
    mask="attention_mask",
    rope="position_embeddings",
)


def why_not(model: nn.Module) -> str:
    """What keeps the model from being understood in full; empty when nothing does."""
    found = _blocks(model)
    if not found:
        return "it has no list of DINOv3ViTLayer"
    container = getattr(*found)
    return lacking(container, _parts(container))


def _blocks(model: nn.Module) -> tuple[nn.Module, str] | None:
    from transformers.models.dinov3_vit.modeling_dinov3_vit import DINOv3ViTLayer

    return find_blocks(model, DINOv3ViTLayer)


def _parts(container: nn.Module) -> BlockParts:
    mlp = whole_mlp((block for _, _, block in blocks_in(container)), PARTS.mlp)
    gated = getattr(mlp, "gate_proj", ABSENT) is not ABSENT
    return replace(PARTS, mlp_parts=GATED if gated else PLAIN)


def view(model: Any) -> Backbone:
    """See the model as sites."""
    found = _blocks(model)
    if found is None:
        raise AssertionError("why_not() admits models with blocks only")
    parts = _parts(getattr(*found))
    sites = assemble(getattr(*found), parts)
    embeddings = _base(model).embeddings
    maps = getattr(model, "out_features", None) is not None
    patch = LayerSite("patch", *plain(embeddings, "patch_embeddings"), "patch")
    return Backbone(
        model=model,
        family="hf_dinov3",
        input_size=size_in_config(model.config),
        blocks=sites.blocks,
        linears=sites.linears,
        convs=(patch,),
        heads=sites.heads,
        hidden=sites.hidden,
        tokens=None
        if maps
        else TokensSite(
            "tokens",
            *found,
            parts,
            class_tokens=1,
            register_tokens=int(model.config.num_register_tokens),
        ),
        positions=_positions(model, found),
        width=None if maps else _hf_width.site(model, found, parts, patch),
        classifier=last_layers(model, "classifier"),
        missing={"tokens": MAPS, "width": MAPS} if maps else {},
    )


def _base(model: nn.Module) -> Any:
    return next(m for m in model.modules() if getattr(m, "embeddings", None) is not None)


def _patch(model: Any) -> Grid:
    size = model.config.patch_size
    return (size, size) if isinstance(size, int) else tuple(size)


def _positions(model: Any, blocks: tuple[nn.Module, str]) -> PositionsSite:
    embeddings = _base(model).embeddings
    _, height, width = size_in_config(model.config)
    patch = _patch(model)
    return PositionsSite(
        key="positions",
        model=model,
        parts=POSITIONS,
        owner=embeddings,
        attribute="patch_embeddings",  # nothing stands between the sequence and the blocks
        container=blocks,
        grid=(height // patch[0], width // patch[1]),
        patch=patch,
        prefix=1 + int(model.config.num_register_tokens),
        width=int(model.config.hidden_size),
        bias=plain(embeddings, "patch_embeddings"),
        channels_first=True,
    )


def _patches(model: Any, images: Tensor) -> Tensor:
    convolution: Any = without_rows(_base(model).embeddings.patch_embeddings)
    patches: Tensor = convolution(images.to(convolution.weight.dtype))
    return patches.flatten(2).transpose(1, 2)


def _prefix(model: Any) -> Tensor:
    embeddings = _base(model).embeddings
    return torch.cat([embeddings.cls_token, embeddings.register_tokens], dim=1)


def _rope(model: Any, images: Tensor) -> Any:
    base = _base(model)
    return base.rope_embeddings(images.to(base.embeddings.patch_embeddings.weight.dtype))


def _encode(model: Any, tokens: Tensor, rope: Any) -> Tensor:
    base = _base(model)
    normed: Tensor = base.norm(run(base.model.layer, tokens, position_embeddings=rope))
    return normed


def _resize(model: Any, grid: Grid) -> None:
    base = _base(model)
    base.rope_embeddings.num_patches_h, base.rope_embeddings.num_patches_w = grid
    set_config_size(model, grid[0] * _patch(model)[0])


POSITIONS = PositionParts(
    patches=_patches, prefix=_prefix, encode=_encode, resize=_resize, rope=_rope
)
