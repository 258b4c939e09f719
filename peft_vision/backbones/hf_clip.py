"""transformers' CLIP vision tower, alone, with its projection or with a classifier."""

from __future__ import annotations

from typing import Any

from torch import nn

from peft_vision.backbones import _hf_towers, _hf_width
from peft_vision.backbones.assembly import (
    assemble,
    find_blocks,
    lacking,
    last_layers,
    readouts_in,
    size_in_config,
)
from peft_vision.backbones.sites import Backbone, LayerSite, TokensSite
from peft_vision.layers.attention_parts import AttentionParts
from peft_vision.layers.block import BlockParts
from peft_vision.layers.mlp import MlpParts

MODULES = ("transformers.models.clip.modeling_clip",)

PARTS = BlockParts(
    norm1="layer_norm1",
    attention="self_attn",
    after1=(),
    norm2="layer_norm2",
    mlp="mlp",
    after2=(),
    attention_parts=AttentionParts(
        qkv=("q_proj", "k_proj", "v_proj"),
        out="out_proj",
        heads=("num_heads",),
        dropout="dropout",
    ),
    mlp_parts=MlpParts(up=("fc1",), down="fc2"),
    mask="attention_mask",
)


def why_not(model: nn.Module) -> str:
    """What keeps the model from being understood in full; empty when nothing does."""
    from transformers.models.clip.modeling_clip import (
        CLIPForImageClassification,
        CLIPVisionModel,
        CLIPVisionModelWithProjection,
    )

    known = (CLIPVisionModel, CLIPVisionModelWithProjection, CLIPForImageClassification)
    if not isinstance(model, known):
        return "it has a text tower; pass the vision tower alone (model.vision_model)"
    found = _blocks(model)
    return lacking(getattr(*found), PARTS) if found else "it has no list of CLIPEncoderLayer"


def _blocks(model: nn.Module) -> tuple[nn.Module, str] | None:
    from transformers.models.clip.modeling_clip import CLIPEncoderLayer

    return find_blocks(model, CLIPEncoderLayer)


def view(model: Any) -> Backbone:
    """See the model as sites."""
    from transformers.models.clip.modeling_clip import (
        CLIPForImageClassification,
        CLIPVisionEmbeddings,
    )

    found = _blocks(model)
    if found is None:
        raise AssertionError("why_not() admits models with blocks only")
    vision = getattr(model.config, "vision_config", model.config)
    sites = assemble(getattr(*found), PARTS)
    embeddings = next(m for m in model.modules() if isinstance(m, CLIPVisionEmbeddings))
    averages = isinstance(model, CLIPForImageClassification)
    patch = LayerSite("patch", embeddings, "patch_embedding", "patch")
    return Backbone(
        model=model,
        family="hf_clip",
        input_size=size_in_config(vision),
        blocks=sites.blocks,
        linears=sites.linears,
        convs=(patch,),
        heads=sites.heads,
        hidden=sites.hidden,
        tokens=TokensSite("tokens", *found, PARTS, 1, pooling="average" if averages else "class"),
        positions=_hf_towers.site(model, found, 1),
        width=None if averages else _hf_width.site(model, found, PARTS, patch),
        classifier=last_layers(model, "classifier", "visual_projection"),
        readouts=readouts_in(model, vision.hidden_size, "classifier"),
        missing={"width": "its classifier reads the stream itself, without a norm between"}
        if averages
        else {},
    )
