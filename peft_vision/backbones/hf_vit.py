"""transformers' ViT, with a classifier or without."""

from __future__ import annotations

from typing import Any

from torch import nn

from peft_vision.backbones.assembly import (
    assemble,
    find_blocks,
    lacking,
    last_layers,
    size_in_config,
)
from peft_vision.backbones.sites import Backbone, LayerSite, TokensSite
from peft_vision.layers.attention import AttentionParts
from peft_vision.layers.block import BlockParts
from peft_vision.layers.mlp import MlpParts

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
    from transformers.models.vit.modeling_vit import ViTForMaskedImageModeling, ViTModel

    base: Any = next(module for module in model.modules() if isinstance(module, ViTModel))
    found = _blocks(model)
    if found is None:
        raise AssertionError("why_not() admits models with blocks only")
    sites = assemble(getattr(*found), PARTS)
    rebuilds = isinstance(model, ViTForMaskedImageModeling)
    pooled = base is not model or base.pooler is not None
    return Backbone(
        model=model,
        family="hf_vit",
        input_size=size_in_config(model.config),
        blocks=sites.blocks,
        linears=sites.linears,
        convs=(LayerSite("patch", base.embeddings.patch_embeddings, "projection", "patch"),),
        heads=sites.heads,
        hidden=sites.hidden,
        tokens=None
        if rebuilds
        else TokensSite("tokens", *found, PARTS, 1, pooling="class" if pooled else "none"),
        classifier=last_layers(model, "classifier"),
        missing={"tokens": "it rebuilds every patch"} if rebuilds else {},
    )
