"""transformers' DINOv2, with registers and without, with a classifier and without."""

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
    readouts_in,
    size_in_config,
    whole_mlp,
)
from peft_vision.backbones.positions import (
    PositionParts,
    PositionsSite,
    run,
    set_config_size,
)
from peft_vision.backbones.sites import Backbone, LayerSite, TokensSite
from peft_vision.layers.attention_parts import AttentionParts
from peft_vision.layers.block import BlockParts
from peft_vision.layers.mlp import MlpParts
from peft_vision.layers.positions import Grid
from peft_vision.layers.trunk import blocks_in

MODULES = (
    "transformers.models.dinov2.modeling_dinov2",
    "transformers.models.dinov2_with_registers.modeling_dinov2_with_registers",
)

MAPS = "its feature maps need every patch, and are read by others"

PLAIN = MlpParts(up=("fc1",), down="fc2")
GATED = MlpParts(up=("gate_proj", "up_proj"), down="down_proj")

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
        heads=("num_attention_heads",),
        dropout="attention_dropout",
    ),
    mlp_parts=PLAIN,
    mask="attention_mask",
)


def why_not(model: nn.Module) -> str:
    """What keeps the model from being understood in full; empty when nothing does."""
    found = _blocks(model)
    if not found:
        return "it has no list of DINOv2 layers"
    container = getattr(*found)
    return lacking(container, _parts(container))


def _blocks(model: nn.Module) -> tuple[nn.Module, str] | None:
    from transformers.models.dinov2.modeling_dinov2 import Dinov2Layer
    from transformers.models.dinov2_with_registers.modeling_dinov2_with_registers import (
        Dinov2WithRegistersLayer,
    )

    return find_blocks(model, Dinov2Layer) or find_blocks(model, Dinov2WithRegistersLayer)


def _parts(container: nn.Module) -> BlockParts:
    mlp = whole_mlp((block for _, _, block in blocks_in(container)), PARTS.mlp)
    gated = getattr(mlp, GATED.down, ABSENT) is not ABSENT
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
    patch = LayerSite("patch", embeddings.patch_embeddings, "projection", "patch")
    return Backbone(
        model=model,
        family="hf_dinov2",
        input_size=size_in_config(model.config),
        blocks=sites.blocks,
        linears=sites.linears,
        convs=(patch,),
        heads=sites.heads,
        hidden=sites.hidden,
        tokens=None if maps else _tokens(model, found, parts),
        positions=_positions(model, found),
        width=None if maps else _hf_width.site(model, found, parts, patch),
        classifier=last_layers(model, "classifier"),
        readouts=readouts_in(model, 2 * model.config.hidden_size, "classifier"),
        missing={"tokens": MAPS, "width": MAPS} if maps else {},
    )


def _tokens(model: Any, found: tuple[nn.Module, str], parts: BlockParts) -> TokensSite:
    # The classifiers read the class token beside the mean of the patches.
    classifies = "classifier" in dict(model.named_children())
    return TokensSite(
        "tokens",
        *found,
        parts,
        class_tokens=1,
        register_tokens=int(getattr(model.config, "num_register_tokens", 0)),
        pooling="class+average" if classifies else "class",
    )


def _base(model: nn.Module) -> Any:
    return next(m for m in model.modules() if getattr(m, "embeddings", None) is not None)


def _positions(model: Any, blocks: tuple[nn.Module, str]) -> PositionsSite:
    embeddings = _base(model).embeddings
    (height, width), patch = (
        embeddings.patch_embeddings.image_size,
        embeddings.patch_embeddings.patch_size,
    )
    return PositionsSite(
        key="positions",
        model=model,
        parts=POSITIONS,
        owner=embeddings,
        attribute="dropout",
        container=blocks,
        grid=(height // patch[0], width // patch[1]),
        patch=tuple(patch),
        prefix=1 + int(getattr(model.config, "num_register_tokens", 0)),
        width=int(model.config.hidden_size),
        table=(embeddings, "position_embeddings"),
        leading=1,
        bias=(embeddings.patch_embeddings, "projection"),
    )


def _patches(model: Any, images: Tensor) -> Tensor:
    patches: Tensor = _base(model).embeddings.patch_embeddings(images)
    return patches


def _prefix(model: Any) -> Tensor:
    embeddings = _base(model).embeddings
    token: Tensor = embeddings.cls_token + embeddings.position_embeddings[:, :1]
    registers = getattr(embeddings, "register_tokens", None)
    return token if registers is None else torch.cat([token, registers], dim=1)


def _encode(model: Any, tokens: Tensor, rope: Any) -> Tensor:
    base = _base(model)
    normed: Tensor = base.layernorm(run(base.encoder.layer, tokens))
    return normed


def _resize(model: Any, grid: Grid) -> None:
    embed = _base(model).embeddings.patch_embeddings
    side = grid[0] * embed.patch_size[0]
    embed.image_size = (side, side)
    embed.num_patches = grid[0] * grid[1]
    set_config_size(model, side)


POSITIONS = PositionParts(patches=_patches, prefix=_prefix, encode=_encode, resize=_resize)
