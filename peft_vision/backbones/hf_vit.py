"""transformers' ViT, with a classifier or without."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from peft_vision.backbones import _hf_width
from peft_vision.backbones.assembly import (
    assemble,
    find_blocks,
    lacking,
    last_layers,
    readouts_in,
    size_in_config,
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

MODULES = ("transformers.models.vit.modeling_vit",)

PARTS = BlockParts(
    norm1="layernorm_before",
    attention="attention",
    after1=("dropout",),
    norm2="layernorm_after",
    mlp="mlp",
    after2=("dropout",),
    attention_parts=AttentionParts(
        qkv=("q_proj", "k_proj", "v_proj"),
        out="o_proj",
        heads=("num_attention_heads",),
        dropout="attention_dropout",
    ),
    mlp_parts=MlpParts(up=("fc1",), down="fc2"),
    mask="attention_mask",
)


def why_not(model: nn.Module) -> str:
    """What keeps the model from being understood in full; empty when nothing does."""
    found = _blocks(model)
    return lacking(getattr(*found), PARTS) if found else "it has no list of ViTLayer"


def _blocks(model: nn.Module) -> tuple[nn.Module, str] | None:
    from transformers.models.vit.modeling_vit import ViTLayer

    return find_blocks(model, ViTLayer)


def view(model: Any) -> Backbone:
    """See the model as sites."""
    from transformers.models.vit.modeling_vit import ViTForMaskedImageModeling

    base = _base(model)
    found = _blocks(model)
    if found is None:
        raise AssertionError("why_not() admits models with blocks only")
    sites = assemble(getattr(*found), PARTS)
    rebuilds = isinstance(model, ViTForMaskedImageModeling)
    pooled = base is not model or base.pooler is not None
    patch = LayerSite("patch", base.embeddings.patch_embeddings, "projection", "patch")
    return Backbone(
        model=model,
        family="hf_vit",
        input_size=size_in_config(model.config),
        blocks=sites.blocks,
        linears=sites.linears,
        convs=(patch,),
        heads=sites.heads,
        hidden=sites.hidden,
        tokens=None
        if rebuilds
        else TokensSite("tokens", *found, PARTS, 1, pooling="class" if pooled else "none"),
        positions=_positions(model, found),
        width=None if rebuilds else _hf_width.site(model, found, PARTS, patch),
        classifier=last_layers(model, "classifier"),
        readouts=readouts_in(model, model.config.hidden_size, "classifier"),
        missing=dict.fromkeys(("tokens", "width"), "it rebuilds every patch") if rebuilds else {},
    )


def _base(model: nn.Module) -> Any:
    from transformers.models.vit.modeling_vit import ViTModel

    return next(module for module in model.modules() if isinstance(module, ViTModel))


def _positions(model: Any, blocks: tuple[nn.Module, str]) -> PositionsSite:
    embeddings = _base(model).embeddings
    (height, width), patch = embeddings.image_size, embeddings.patch_embeddings.patch_size
    return PositionsSite(
        key="positions",
        model=model,
        parts=POSITIONS,
        owner=embeddings,
        attribute="dropout",
        container=blocks,
        grid=(height // patch[0], width // patch[1]),
        patch=tuple(patch),
        prefix=1,
        width=int(model.config.hidden_size),
        table=(embeddings, "position_embeddings"),
        leading=1,
        bias=(embeddings.patch_embeddings, "projection"),
    )


def _patches(model: Any, images: Tensor) -> Tensor:
    embed = _base(model).embeddings.patch_embeddings
    patches: Tensor = embed(images.to(embed.projection.weight.dtype))
    return patches


def _prefix(model: Any) -> Tensor:
    embeddings = _base(model).embeddings
    token: Tensor = embeddings.cls_token + embeddings.position_embeddings[:, :1]
    return token


def _encode(model: Any, tokens: Tensor, rope: Any) -> Tensor:
    base = _base(model)
    normed: Tensor = base.layernorm(run(base.layers, tokens))
    return normed


def _resize(model: Any, grid: Grid) -> None:
    embeddings = _base(model).embeddings
    embed = embeddings.patch_embeddings
    side = grid[0] * embed.patch_size[0]
    embeddings.image_size = embed.image_size = (side, side)
    embed.num_patches = grid[0] * grid[1]
    set_config_size(model, side)


POSITIONS = PositionParts(patches=_patches, prefix=_prefix, encode=_encode, resize=_resize)
